"""YAML that people write: parsed strictly, refused with the line."""
