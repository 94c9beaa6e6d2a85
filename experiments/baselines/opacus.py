"""Steps of Opacus: `hooks`, `ghost` (two backward passes), and `plain` ones of PyTorch."""

import importlib.metadata

import torch
from torch import nn

from experiments.baselines import worker


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 4, stride=4)
        self.tokens = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.hidden = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.back = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.logits = nn.Linear(4096, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        for tokens, hidden, back in zip(self.tokens, self.hidden, self.back, strict=True):
            x = x + tokens(x.transpose(1, 2)).relu().transpose(1, 2)
            x = x + back(hidden(x).relu())
        return self.logits(x.flatten(1))


def network_of(name):
    def stage(inputs, outputs):
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]

    def dense(inputs, outputs):
        return [nn.Linear(inputs, outputs), nn.ReLU()]

    if name == "mixer":
        return Mixer()
    bodies = {
        "convnet": [*stage(1, 16), *stage(16, 32), nn.Flatten(), *dense(1568, 1024)],
        "vgg5": [*stage(3, 32), *stage(32, 64), *stage(64, 128), nn.Flatten(), *dense(2048, 256)],
        "mlp": [nn.Flatten(), *dense(784, 1024), *dense(1024, 1024), *dense(1024, 1024)],
        "scattering": [],
    }
    last = {"convnet": 1024, "vgg5": 256, "mlp": 1024, "scattering": 2187}
    return nn.Sequential(*bodies[name], nn.Linear(last[name], 10))


def build(method, name, batch_size):
    from opacus import PrivacyEngine

    network = network_of(name)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    x, y = (torch.from_numpy(a) for a in worker.examples(name, batch_size))
    if x.ndim == 4:
        x = x.permute(0, 3, 1, 2).contiguous()
    if method != "plain":
        data = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x, y), batch_size=batch_size
        )
        made = PrivacyEngine().make_private(
            module=network,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=data,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,  # rows are drawn below, which is cheaper than its loader
            grad_sample_mode=method,
        )
        network, optimizer, *more = made[:-1]
        criterion = more[0] if more else criterion
    network.train()

    def step():
        drawn = torch.randint(len(x), (batch_size,))
        optimizer.zero_grad()
        loss = criterion(network(x[drawn]), y[drawn])
        loss.backward()
        optimizer.step()
        return loss.item()

    return worker.repeated(step), {
        "opacus": importlib.metadata.version("opacus"),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    worker.serve(build)
