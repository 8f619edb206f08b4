"""Weights in and out of files: published, timm's, safetensors."""
