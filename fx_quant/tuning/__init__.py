"""How a tuner decides, and the files that keep what it decided; what is tried, and how it is timed, is a provider's."""
