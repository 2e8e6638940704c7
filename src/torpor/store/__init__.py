"""Objects in a bucket: one interface over obstore, wrapped for retry, limits and faults."""
