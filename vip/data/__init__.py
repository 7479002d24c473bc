"""Data sets and loaders on top of timm's."""
