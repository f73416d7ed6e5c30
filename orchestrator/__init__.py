"""What to run, where it stands, what came out."""
