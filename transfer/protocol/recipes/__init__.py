"""What papers and public code say of fine-tuning, as settings."""
