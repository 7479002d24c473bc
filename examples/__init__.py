"""Vision Permutators in other libraries, as those take timm models. Each runs offline, in seconds, on a CPU."""
