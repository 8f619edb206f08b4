"""What is measured of a trial: what it predicts, on which images, and what it takes."""
