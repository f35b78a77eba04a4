"""Objects in buckets (Google Cloud Storage, S3), their local copies, locks, and weights on the Hugging Face Hub."""
