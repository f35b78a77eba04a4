"""Objects in buckets of Google Cloud Storage and S3, and leases on them."""
