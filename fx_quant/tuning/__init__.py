"""What was measured on this machine: how it is kept, and the plans that it chooses."""
