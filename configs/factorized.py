"""LeNet on MNIST with factorized kernels, trained from scratch or decomposed from a dense net.

    python -m efficient_nets.main --config=configs/factorized.py:tt:0.1 --workdir=runs/tt
    python -m efficient_nets.main --config=configs/factorized.py:cp:0.1,dense=2 --workdir=runs/cp
    python -m efficient_nets.main --config=configs/factorized.py:tt:0.2,model=vgg,dataset=cifar10
    python -m efficient_nets.main --config=configs/factorized.py:tucker:energy=0.5,kept=1 \
        --config.checkpoint.convert_from=runs/dense --mode=decompose

45,706 parameters, 10.0 M MACs. The argument is a kernel of
`efficient_nets/ops/factorization/spec.py`, here with a tenth of the dense one's parameters, and
options: model (lenet, vgg), dataset, dropout and lasso of the kernel's bonds, and dense, the epochs
for which the dense net is trained first, whose kernels are decomposed then; kept=1 is for a dense
net that is there, given by --config.checkpoint.convert_from, to be trained on or for
--mode=decompose. The head stays dense, and so does a layer whose cores would have no fewer
parameters. Two CPU cores take about a minute an epoch of LeNet.
"""

from efficient_nets import recipes


def get_config(text: str = "tt:0.1"):
    given = recipes.arguments(
        text,
        kernel="tt:0.1",
        model="lenet",
        dataset="mnist",
        dense=0.0,
        kept=0,
        dropout=0.0,
        lasso=0.0,
    )
    of_bonds = (f",{key}={given[key]}" for key in ("dropout", "lasso") if given[key])
    kernel = given["kernel"] + "".join(of_bonds)
    return recipes.factorized(
        kernel, *(given[key] for key in ("model", "dataset", "dense")), kept=bool(given["kept"])
    )
