"""Quadratic SSD300 on Pascal VOC: the convolutions of backbone, conv6 and conv7 are quadratic.

    python -m efficient_nets.main --config=configs/qssd_voc.py --workdir=runs/qssd_voc
    python -m efficient_nets.main --config=configs/qssd_voc.py:vgg7
    python -m efficient_nets.main --config=configs/qssd_voc.py:resnet18
    python -m efficient_nets.main --config=configs/qssd_voc.py:resnet50
    python -m efficient_nets.main --config=configs/qssd_voc.py:mobilenet

67,307,310 parameters, 91.2 G MACs; vgg7 stands on QVGG-7. Data and training as in
`configs/ssd_voc.py`. Not run by us.
"""

from efficient_nets import recipes


def get_config(backbone: str = "vgg16"):
    config = recipes.ssd_voc(backbone)
    config.layers = (dict(recipes.QUADRATIC_DETECTOR),)
    return config
