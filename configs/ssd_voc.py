"""SSD300 on Pascal VOC, trained on 2007 and 2012, tested on 2007.

    python -m efficient_nets.data.prepare voc/2007
    python -m efficient_nets.data.prepare voc/2012
    python -m efficient_nets.main --config=configs/ssd_voc.py --workdir=runs/ssd_voc
    python -m efficient_nets.main --config=configs/ssd_voc.py:vgg7
    python -m efficient_nets.main --config=configs/ssd_voc.py:resnet18
    python -m efficient_nets.main --config=configs/ssd_voc.py:resnet50
    python -m efficient_nets.main --config=configs/ssd_voc.py:mobilenet

26,301,870 parameters, 31.4 G MACs: VGG-16 with batch norms. The papers start from a classifier,
which is --config.checkpoint.init_from=WORKDIR, the workdir of a net of that architecture. Published
for SSD300 that starts so: 74.3 mAP (arXiv 1512.02325, version 2), 77.2 with the expansion that this
has too (version 5), in `test/ap50_voc07`. Not run by us.
"""

from efficient_nets import recipes


def get_config(backbone: str = "vgg16"):
    return recipes.ssd_voc(backbone)
