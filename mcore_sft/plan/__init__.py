"""What will fit and how fast, before anything runs: memory, seconds and layouts by arithmetic."""
