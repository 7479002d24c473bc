"""Semantic segmentation with a Vision Permutator or an LV-ViT as the encoder, end to end."""
