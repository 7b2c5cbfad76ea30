"""A convolutional network on drawn digits, in Horovod's way: such a script runs with its import line changed.

    import headway.horovod as hvd          # was: import horovod.torch as hvd

Runs alone or on several processes::

    python examples/mnist_horovod.py
    torchrun --nproc-per-node 2 examples/mnist_horovod.py

The digits are drawn here, from a 5 x 7 dot font that is scaled, turned, moved and blurred, so nothing is downloaded.
After the default three epochs at least 95 % of digits not seen in training are told rightly; less is an error.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import headway.horovod as hvd

# Each digit as seven rows of five dots.
FONT = [
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00010 00100 01000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
]


def draw_digits(count: int, seed: int) -> TensorDataset:
    """`count` pictures of 28 x 28 and the digits that they show; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    dots = [[[float(dot) for dot in row] for row in digit.split()] for digit in FONT]
    glyphs = F.pad(torch.tensor(dots), (1, 1, 1, 1)).unsqueeze(1)
    labels = torch.randint(10, (count,), generator=generator)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, size, slant = uniform(-0.25, 0.25), uniform(0.95, 1.5), uniform(-0.3, 0.3)
    turn = torch.stack(
        [
            torch.stack([size * angle.cos(), size * (slant - angle.sin()), uniform(-0.25, 0.25)], dim=1),
            torch.stack([size * angle.sin(), size * angle.cos(), uniform(-0.25, 0.25)], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(turn, [count, 1, 28, 28], align_corners=False)
    pictures = F.grid_sample(glyphs[labels], grid, align_corners=False)
    pictures = pictures * uniform(0.6, 1.0).view(-1, 1, 1, 1)
    pictures += 0.15 * torch.randn(pictures.shape, generator=generator)
    return TensorDataset(pictures, labels)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, kernel_size=5)
        self.conv2 = nn.Conv2d(8, 16, kernel_size=5)
        self.dropout = nn.Dropout2d(0.1)
        self.fc1 = nn.Linear(256, 48)
        self.fc2 = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.dropout(self.conv2(x)), 2))
        x = F.relu(self.fc1(x.flatten(1)))
        return F.log_softmax(self.fc2(x), dim=1)


def train(model, optimizer, loader, sampler, epoch, device, arguments):
    model.train()
    sampler.set_epoch(epoch)  # another order, and other shares of the ranks, in each epoch
    for number, (pictures, labels) in enumerate(loader):
        pictures, labels = pictures.to(device), labels.to(device)
        optimizer.zero_grad()
        loss = F.nll_loss(model(pictures), labels)
        loss.backward()
        optimizer.step()
        if number % arguments.log_interval == 0 and hvd.rank() == 0:
            print(f"epoch {epoch}, {number * len(pictures)} of {len(sampler)} pictures: loss {loss.item():.4f}")


def metric_average(value: float, name: str) -> float:
    return hvd.allreduce(torch.tensor(value), name=name).item()


def test(model, loader, device) -> tuple[float, float]:
    """(loss, share of digits told rightly) over the test pictures of all ranks."""
    model.eval()
    loss, right, count = 0.0, 0.0, 0
    with torch.no_grad():
        for pictures, labels in loader:
            pictures, labels = pictures.to(device), labels.to(device)
            output = model(pictures)
            loss += F.nll_loss(output, labels, reduction="sum").item()
            right += (output.argmax(dim=1) == labels).sum().item()
            count += len(labels)
    return metric_average(loss / count, "test_loss"), metric_average(right / count, "test_accuracy")


def parameters_are_identical(model) -> bool:
    """Whether every rank has the same bits in every parameter."""
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).cpu()
    everybody = hvd.allgather(flat.unsqueeze(0), name="parameters")
    return bool((everybody == flat).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch-size", type=int, default=32, help="pictures in a step, on each rank")
    parser.add_argument("--test-batch-size", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--train-size", type=int, default=6000, help="pictures to train on, over all ranks")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate for one rank")
    parser.add_argument("--momentum", type=float, default=0.8)
    parser.add_argument("--no-cuda", action="store_true", help="stay on the CPU")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--log-interval", type=int, default=25, help="steps between two lines")
    parser.add_argument("--fp16-allreduce", action="store_true", help="send gradients in half precision")
    parser.add_argument("--use-adasum", action="store_true", help="combine gradients by Adasum")
    parser.add_argument("--gradient-predivide-factor", type=float, default=1.0)
    parser.add_argument("--expect-accuracy", type=float, default=0.95, help="less is an error")
    arguments = parser.parse_args()

    hvd.init()
    torch.manual_seed(arguments.seed)
    use_cuda = torch.cuda.is_available() and not arguments.no_cuda
    if use_cuda:
        torch.cuda.set_device(hvd.local_rank())
    device = torch.device("cuda" if use_cuda else "cpu")

    train_set, test_set = draw_digits(arguments.train_size, seed=1), draw_digits(1000, seed=2)
    # Each rank goes through its own share of the pictures.
    train_sampler = DistributedSampler(train_set, num_replicas=hvd.size(), rank=hvd.rank())
    test_sampler = DistributedSampler(test_set, num_replicas=hvd.size(), rank=hvd.rank())
    train_loader = DataLoader(train_set, batch_size=arguments.batch_size, sampler=train_sampler)
    test_loader = DataLoader(test_set, batch_size=arguments.test_batch_size, sampler=test_sampler)

    model = Net().to(device)
    # More ranks make a larger batch, which wants a larger learning rate; Adasum finds the scale by itself.
    scale = 1 if arguments.use_adasum else hvd.size()
    optimizer = torch.optim.SGD(model.parameters(), lr=arguments.lr * scale, momentum=arguments.momentum)

    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=hvd.Compression.fp16 if arguments.fp16_allreduce else hvd.Compression.none,
        op=hvd.Adasum if arguments.use_adasum else hvd.Average,
        gradient_predivide_factor=arguments.gradient_predivide_factor,
    )

    accuracy = 0.0
    for epoch in range(1, arguments.epochs + 1):
        train(model, optimizer, train_loader, train_sampler, epoch, device, arguments)
        loss, accuracy = test(model, test_loader, device)
        if hvd.rank() == 0:
            print(f"after epoch {epoch}: test loss {loss:.4f}, accuracy {accuracy:.1%}")

    identical = parameters_are_identical(model)
    if hvd.rank() == 0:
        print(f"parameters on {hvd.size()} ranks: {'identical' if identical else 'different'}")
    if not identical:
        sys.exit("the ranks have different parameters")
    if accuracy < arguments.expect_accuracy:
        sys.exit(f"accuracy {accuracy:.1%} is below {arguments.expect_accuracy:.1%}")


if __name__ == "__main__":
    main()
