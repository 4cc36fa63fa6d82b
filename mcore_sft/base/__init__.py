"""The ground floor: what every room stands on, and what has no room of its own."""
