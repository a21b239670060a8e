"""What the command does beside serving."""
