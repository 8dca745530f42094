import torch

from tempo.worker.update import *


class Lion(torch.optim.Optimizer):
    pass
