"""Routes that belong to no API."""
