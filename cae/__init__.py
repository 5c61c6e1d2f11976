"""Class association embedding: what an image classifier looks at. Works without Ray and MLflow."""
