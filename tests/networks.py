"""Small real networks that tests and benchmarks of per-sample capture share; each takes (B, ...) and gives logits."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between."""
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class LeNet(nn.Module):
    """LeCun et al. 1998, with max pooling and ReLU: 44,426 parameters on 28 x 28 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(256, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def norm_of(kind: str, channels: int) -> nn.Module:
    """A normalization layer: "batch" or "group" (4 groups)."""
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(4, channels)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions, normalization, in-place ReLU; a strided 1 x 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1, self.norm2 = norm_of(norm, outputs), norm_of(norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """He et al. 2016 for small images: 6 * depth + 2 layers; depth 3 and width 16 are ResNet-20, 272 K parameters."""

    def __init__(self, depth: int = 3, width: int = 16, norm: str = "batch", channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.norm = norm_of(norm, width)
        blocks, inputs = [], width
        for stage in range(3):
            for number in range(depth):
                stride = 2 if stage and not number else 1
                blocks.append(ResidualBlock(inputs, width << stage, stride, norm))
                inputs = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)), inplace=True)).mean((2, 3)))


class ViT(nn.Module):
    """A vision transformer with class token and learned positions, bare parameters of the root module."""

    def __init__(self, width: int = 32, depth: int = 2, heads: int = 4, patch: int = 7, dropout: float = 0.0) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.cls = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, (28 // patch) ** 2 + 1, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.encoder(x)[:, 0])


class CharLSTM(nn.Module):
    """Characters to the next character: embedding, LSTM, linear; logits (B * T, characters)."""

    def __init__(self, characters: int = 65, width: int = 64, hidden: int = 128, layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.lstm = nn.LSTM(width, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, characters)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(x))[0]).flatten(0, 1)


class Attention(nn.Module):
    """Causal self-attention with separate projections."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.heads, self.dropout = heads, dropout

    def forward(self, x: Tensor) -> Tensor:
        b, t, e = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, e))


class Block(nn.Module):
    """A transformer block, norm first."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A causal language model; logits (B * T, tokens)."""

    def __init__(
        self,
        tokens: int = 65,
        length: int = 128,
        width: int = 256,
        depth: int = 6,
        heads: int = 8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.positions[: x.shape[1]]
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)


class BagOfWords(nn.Module):
    """The mean of word vectors, then a linear layer."""

    def __init__(self, words: int = 50, width: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(words, width, mode="mean", padding_idx=0)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x))


class TiedAutoencoder(nn.Module):
    """Encoder and decoder share a layer, and the head shares the encoder's weight: one tensor, three sites."""

    def __init__(self, width: int = 12, hidden: int = 12) -> None:
        super().__init__()
        self.encode = nn.Linear(width, hidden)
        self.head = nn.Linear(hidden, width)
        self.head.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.encode(torch.tanh(self.encode(x)))))
