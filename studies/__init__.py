"""Studies: what the models and their training are compared by. Each runs by one command and can be interrupted."""
