"""Lightning callbacks: what a run leaves behind."""
