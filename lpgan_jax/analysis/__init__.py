"""What a program does, found out without running it."""
