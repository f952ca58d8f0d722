"""Values in all objects: ids, times, names, unknown fields."""
