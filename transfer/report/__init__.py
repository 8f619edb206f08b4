"""Results for people: pages, plots."""
