"""Published ways to choose what is kept, moved and computed again, one file each."""
