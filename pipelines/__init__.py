"""The stages of a run, one verb a file; the only home of Ray and MLflow."""
