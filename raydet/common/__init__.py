"""What every other package may use and that uses none of them: errors, console, threads, signals, box arithmetic."""
