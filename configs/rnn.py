"""An LSTM or GRU with factorized kernels that reads MNIST row by row, or pixel by pixel.

    python -m efficient_nets.main --config=configs/rnn.py --workdir=runs/rnn
    python -m efficient_nets.main --config=configs/rnn.py:dense --workdir=runs/rnn_dense
    python -m efficient_nets.main --config=configs/rnn.py:tr:4,cell=gru,factorize=hidden
    python -m efficient_nets.main --config=configs/rnn.py:ht:4,sequence=pixels
    python -m efficient_nets.main --config=configs/rnn.py:tt:4,dataset=fashion_mnist

3,306 parameters, 1.4 M MACs. The argument is a kernel of
`efficient_nets/ops/factorization/spec.py` or 'dense', and options: cell (lstm, gru), sequence
(rows, pixels), factorize (input, hidden, both), which of the two kernels of a step is not dense,
and a data set. 89.5% on MNIST after 2 epochs (`--config.train.epochs=2`), which took 4 minutes on
two busy CPU cores; more was not run. The dense LSTM has 81,674 parameters and 2.2 M MACs.
"""

from efficient_nets import config as configs
from efficient_nets import names, recipes

FACTORIZE = {"input": r"/input$", "hidden": r"/hidden$", "both": r"/(input|hidden)$"}


def get_config(text: str = "tt:4"):
    given = recipes.arguments(
        text, kernel="tt:4", cell="lstm", sequence="rows", factorize="both", dataset="mnist"
    )
    match = names.pick("factorize", given["factorize"], FACTORIZE)
    config = configs.defaults()
    config.model = configs.model("rnn", cell=given["cell"], sequence=given["sequence"])
    config.data.name = given["dataset"]
    config.data.train, config.data.validation = "train[:90%]", "train[90%:]"
    config.layers = (dict(match=match, kernel=given["kernel"]),)
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.clip_norm = 1.0
    config.schedule.warmup_epochs = 0.2
    config.train.epochs = 5.0
    config.train.batch_size = 128
    return config
