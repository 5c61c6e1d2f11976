"""Other ways to explain a classifier, to compare with: one file a method or family, images to maps (B, H, W).

Every method is `method(classifier, images, target, **options)`. Images are (B, 3, H, W) in [-1, 1]; the classifier
gives logits (B, C), is in evaluation mode and is left as it was; `target` (B,) is the class to explain. Maps are on the
images' device, larger = more important for the target, and an image's map is the same in any batch. Methods that use
gradients explain the logit, those that only ask the classifier explain the probability, as their authors do. The
controls ask no classifier: they take the images alone, or with a CAE's reconstructions of them.

`cae.peers.table` has all of them as they are measured, by name, but TS-CAM, which explains only its own classifier.
"""
