# %% [markdown]
# <!-- en -->
# # 5. The network and its sense of time
#
# One network serves all $T$ steps. It gets the noisy image and the time, and gives an image: the noise that it sees. Two things
# about it need an explanation: how it is told the time, and how it looks at an image.
# <!-- ja -->
# # 5. ネットワークと時刻埋め込み
#
# 全部で $T$ 個あるステップを、一つのネットワークが受け持ちます。入力はノイズの乗った画像と時刻、出力は画像と同じ形の「ノイズの予測」です。
# 説明が必要なのは二点、時刻をどう伝えるか、そして画像をどう見るか、です。

# %% [markdown]
# <!-- en -->
# ## Time as sines and cosines
#
# A number like 731 is a poor input for a network. Instead it gets the *sinusoidal embedding* of Transformers (Appendix B), $d$ numbers:
#
# $$\mathrm{PE}(t)_i = \cos(\omega_i t), \qquad \mathrm{PE}(t)_{i + d/2} = \sin(\omega_i t), \qquad \omega_i = 10000^{-2i/d}, \quad i = 0, …, d/2 - 1$$
#
# *The dot product of two times depends on their distance alone*, by $\cos a \cos b + \sin a \sin b = \cos(a - b)$:
#
# $$\mathrm{PE}(t) \cdot \mathrm{PE}(t') = \sum_i \cos(\omega_i (t - t'))$$
#
# It is largest, $d/2$, at $t = t'$. The fast waves tell neighbours apart, the slow ones tell early from late.
# <!-- ja -->
# ## 時刻を正弦波で表す
#
# 731 のような整数をそのまま入力しても、ネットワークには扱いづらいものです。そこで Transformer で使われる**正弦波埋め込み**（付録 B）で、時刻を $d$ 個の数に
# 変換します。
#
# $$\mathrm{PE}(t)_i = \cos(\omega_i t), \qquad \mathrm{PE}(t)_{i + d/2} = \sin(\omega_i t), \qquad \omega_i = 10000^{-2i/d}, \quad i = 0, …, d/2 - 1$$
#
# **二つの時刻の内積は、時刻の差だけで決まります。** 加法定理 $\cos a \cos b + \sin a \sin b = \cos(a - b)$ より
#
# $$\mathrm{PE}(t) \cdot \mathrm{PE}(t') = \sum_i \cos(\omega_i (t - t'))$$
#
# となり、$t = t'$ のとき最大値 $d/2$ を取ります。速い波が隣り合う時刻を区別し、遅い波が序盤か終盤かを区別します。

# %%
import matplotlib.pyplot as plt
import torch
from diffusers import UNet2DModel

unet = UNet2DModel(
    sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 64),
    layers_per_block=1, norm_num_groups=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
t = torch.arange(200)
embedding = unet.time_proj(t).double()
d = embedding.shape[1]
omega = 10_000 ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
by_hand = torch.cat([torch.cos(t[:, None] * omega), torch.sin(t[:, None] * omega)], dim=1)
assert (embedding - by_hand).abs().max() < 1e-4  # Appendix B

products = embedding @ embedding.T
distance = (t[:, None] - t[None]).double()
by_distance = torch.cos(distance[..., None] * omega).sum(-1)
assert (products - by_distance).abs().max() < 1e-3  # Appendix B
assert abs(float(products[5, 5]) - d / 2) < 1e-4
same, apart = float(products[5, 5]), float(products[5, 15])
print(f"{d} components; dot product {same:.1f} of equal times, {apart:.1f} ten steps apart")

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3), width_ratios=(2, 1))
left.imshow(embedding.T, aspect="auto", cmap="RdBu")
left.set_xlabel("t")
left.set_ylabel("component")
left.set_title("the embedding")
right.imshow(products, origin="lower")
right.set_xlabel("t")
right.set_ylabel("t'")
right.set_title("dot products")

# %% [markdown]
# <!-- en -->
# ## The U-Net
#
# An image is halved several times while channels grow, so that a pixel of the smallest map has seen the whole image, and is then
# brought back to full size. Details would be lost on the way, so every map of the way down is handed to the way up (the skip
# connections). Each residual block adds a linear map of the time's embedding to its channels; at low resolution, attention lets all
# places look at each other. It is diffusers' `UNet2DModel`, and the network of the paper's CIFAR-10 has 35.7 million parameters.
# Shapes are read off the running network:
# <!-- ja -->
# ## U-Net
#
# 画像を何度か半分に縮小しながらチャネルを増やし、最も小さな特徴マップでは 1 画素が画像全体を見ている状態にします。その後、元の大きさまで戻します。
# そのままでは細部が失われるので、下りの各特徴マップを上りの対応する段へ直接渡します（**スキップ接続**）。各残差ブロックは時刻埋め込みの線形写像を
# チャネルに加え、解像度の低い段では自己注意機構によってすべての位置が互いを参照します。実装は diffusers の `UNet2DModel` です。論文の CIFAR-10 用
# ネットワークのパラメータ数は 3570 万です。各ブロックの形を、実際に動かして読み取ってみましょう。

# %%
from ddpm_hf.config.parsing import parse_train_config
from ddpm_hf.paper.network import read_blocks
from ddpm_hf.training.network import build_unet

cifar10 = build_unet(parse_train_config(["--config", "cifar10"]))
parameters = sum(p.numel() for p in cifar10.parameters())
print(f"{parameters:,} parameters")
assert parameters == 35_746_307  # Appendix B
for block in read_blocks(cifar10, (3, 32, 32)):
    shape = " × ".join(map(str, block.shape))
    print(f"{block.name:14} {block.kind:18} {shape:14} {block.parameters:>10,}")

# %% [markdown] tags=["exercise"]
# <!-- en -->
# Show that moving by $k$ steps is a rotation of the embedding: there is a matrix $R_k$, which does not depend on $t$, with
# $\mathrm{PE}(t + k) = R_k \mathrm{PE}(t)$.
# <!-- ja -->
# $k$ ステップ進むことが埋め込みの回転であること、すなわち $t$ によらない行列 $R_k$ が存在して $\mathrm{PE}(t + k) = R_k \mathrm{PE}(t)$ と
# なることを示してください。

# %% [markdown] tags=["solution"]
# <!-- en -->
# For each frequency, $(\cos, \sin)$ of $\omega (t + k)$ is $(\cos, \sin)$ of $\omega t$, turned by the angle $\omega k$: the addition theorems.
# <!-- ja -->
# 各周波数について、$\omega (t + k)$ の $(\cos, \sin)$ は $\omega t$ の $(\cos, \sin)$ を角度 $\omega k$ だけ回転したものです（加法定理）。

# %% tags=["solution"]
k = 7
cos, sin = torch.diag(torch.cos(omega * k)), torch.diag(torch.sin(omega * k))
rotation = torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])
assert (by_hand[:-k] @ rotation.T - by_hand[k:]).abs().max() < 1e-12
assert (rotation @ rotation.T - torch.eye(d)).abs().max() < 1e-12
print("one rotation for every t")
