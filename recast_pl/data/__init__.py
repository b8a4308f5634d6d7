"""Where images come from and how they reach the device. Nothing here knows a model.

A task (`tasks.TaskConfig`) goes through four stages:

1. Source (`sources.open_source`): finds the files, classes, labels and official splits. `datasets` reads the user's own
   folders and manifests, `catalogue` and `torchvision_sets` read data sets known by name, `download` fetches them.
   The result is an `ImageSource`.
2. Images (`images.Images`): the images of a source in a fixed order, not decoded yet.
3. Cache (`cache.decode_images`): decodes every image once. The result is `Pixels`: uint8 images by position.
4. Datamodule (`datamodule.SequentialTaskDataModule`): splits the images of each task, reads batches of pixels
   (`batches`), augments them, and converts them to numbers in [0, 1] on the device.
"""
