"""`make demo`: a real model learns arithmetic on a CPU, over both services."""
