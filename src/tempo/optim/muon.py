import torch

from tempo.worker.update import *


class Muon(torch.optim.Optimizer):
    pass
