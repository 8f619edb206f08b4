"""The laboratory: methods of normalisation, and none, on equal terms."""
