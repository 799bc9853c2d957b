"""The rules of the value algebra, one file for each kind of step."""
