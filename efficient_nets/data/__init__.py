"""Image data: from a name in a config to normalised batches on the device.

The only room that knows TensorFlow Datasets (TFDS); nothing here imports TensorFlow but
`prepare.py`, which a person runs once for each set.

    data = load(config.data)
    for batch in train_batches(data.train, 128, seed=0):     # numpy, on the host
        batch = gather(resident, batch)                       # from here on inside jit
        image, label = augment(key, batch["image"], batch["label"], spec=spec, info=data.info)

Fields of `config.data` (`defaults()` gives the defaults, shown here):

    name='cifar10'         a TFDS name; 'digits' (scikit-learn's); 'folder:PATH' for the images in
                           PATH/<split>/<class>/, or in PATH/<class>/ as one split 'train'.
                           Detection: a TFDS name; 'voc/2007+2012' joins configs of one set, whose
                           splits are 'train_2007', 'train_2012', ...
    dir=''                 TFDS data_dir; '' is $TFDS_DATA_DIR or ~/tensorflow_datasets
    train='train'          split strings as in TFDS: 'train[:90%]', 'train[90%:]', 'train+test';
    validation=''          '' is no such split. The images of 'digits' and of folders are put into a
    test='test'            fixed random order first, so that percentages mix the classes
    image_size=0           side S of the images; 0 keeps the set's own. Images of one size are
                           resized. For images of varied size it is required: training crops them
                           at random (as Inception), evaluation takes the centre at S * 256 / 224
    mean=(), std=()        of images in [0, 1], by channel; () takes the known values of the set,
                           or computes them from the train split where that is in memory
    storage='auto'         'memory': decoded once, kept as uint8; 'stream': decoded by workers as
                           needed; 'auto': memory if all splits fit into the limit. Training images
                           of varied size always stream
    memory_limit_gib=4.0   for 'auto', counted in uint8 bytes
    workers=4              processes that decode a stream; 0 decodes in threads of this process
    crop=0                 shift by up to this many pixels; what comes in is 0 *after* normalising
    flip=False             mirror left-right, half of the images
    cutout=0               side of a square set to 0 after normalising
    mixup=0.0              alpha of the Beta distribution of the mixing weight; 0 is off
    stored_size=0          detection: side of the images as they are kept, of which training shows
                           parts; 0 is an eighth more than image_size
    max_boxes=100          detection: objects that an image may have

Crop, flip, cutout and mixup act on training alone. Training drops what is left of each epoch's
permutation after the last whole batch; evaluation sees every image exactly once.
"""

from efficient_nets.data.augmentation import Augmentation, augment, normalise
from efficient_nets.data.batches import eval_batches, gather, train_batches
from efficient_nets.data.detection_augmentation import DetectionAugmentation, augment_detection
from efficient_nets.data.sources import (
    Dataset,
    Info,
    Source,
    describe,
    load,
    statistics_known,
    stored_shape,
)

__all__ = [
    "Augmentation",
    "Dataset",
    "DetectionAugmentation",
    "Info",
    "Source",
    "augment",
    "augment_detection",
    "defaults",
    "describe",
    "eval_batches",
    "gather",
    "load",
    "normalise",
    "statistics_known",
    "stored_shape",
    "train_batches",
]


def defaults() -> dict:
    """The fields of `config.data`, as described above, with their default values."""
    return dict(
        name="cifar10",
        dir="",
        train="train",
        validation="",
        test="test",
        image_size=0,
        mean=(),
        std=(),
        storage="auto",
        memory_limit_gib=4.0,
        workers=4,
        crop=0,
        flip=False,
        cutout=0,
        mixup=0.0,
        stored_size=0,
        max_boxes=100,
    )
