"""Other ways to explain a classifier, to compare with: one file a method, images to maps (B, H, W)."""
