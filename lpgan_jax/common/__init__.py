"""What every room uses: files that are private and whole, tables, progress."""
