# %% [markdown]
# <!-- en -->
# # 6. Training
#
# Everything is there: a way to noise an image to any time, a network, a loss. Algorithm 1 of the paper puts them together, and a
# CPU trains a model of handwritten digits in a minute or two.
# <!-- ja -->
# # 6. 学習
#
# 材料は揃いました。画像に任意の時刻までノイズを加える方法、ネットワーク、そして損失関数です。論文のアルゴリズム 1 はこれらを組み合わせたもので、
# 手書き数字のモデルなら CPU でも 1、2 分で学習できます。

# %% [markdown]
# <!-- en -->
# ## Algorithm 1
#
# Repeat: take an image $x_0$, a time $t$ uniformly from $1, …, T$ and noise $\epsilon \sim \mathcal{N}(0, I)$; take a gradient step on
#
# $$\Vert \epsilon - \epsilon_\theta(\sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon, t) \Vert^2$$
#
# Two numbers to expect, before anything is trained. A network that says 0 has the loss $\mathbb{E} \Vert \epsilon \Vert^2 / d = 1$. And
# in the world of standard normal data the best answer is known: $\epsilon$ and $x_t$ are Gaussian with covariance
# $\sqrt{1 - \bar\alpha_t}$, so the conditional mean is $\sqrt{1 - \bar\alpha_t}\, x_t$, and what is left is $1 - (1 - \bar\alpha_t) = \bar\alpha_t$.
# No network does better, however large.
# <!-- ja -->
# ## アルゴリズム 1
#
# 次を繰り返します。画像 $x_0$、$1, …, T$ から一様に選んだ時刻 $t$、ノイズ $\epsilon \sim \mathcal{N}(0, I)$ を取り、次の式の勾配で
# パラメータを更新します。
#
# $$\Vert \epsilon - \epsilon_\theta(\sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon, t) \Vert^2$$
#
# 学習を始める前に、目安となる値を二つ求めておきます。常に 0 と答えるネットワークの損失は $\mathbb{E} \Vert \epsilon \Vert^2 / d = 1$ です。また、データが
# 標準正規分布なら最良の答えが分かります。$\epsilon$ と $x_t$ は共分散 $\sqrt{1 - \bar\alpha_t}$ のガウス分布に従うので、条件付き期待値は
# $\sqrt{1 - \bar\alpha_t}\, x_t$、残る誤差は $1 - (1 - \bar\alpha_t) = \bar\alpha_t$ です。どれほど大きなネットワークでも、これより良くはなりません。

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from ddpm_hf import DDPMProcess, TrainConfig, load_pipeline, train
from ddpm_hf.diffusion.ddpm_process import make_betas
from ddpm_hf.training.losses import l_simple

process = DDPMProcess(make_betas("squaredcos_cap_v2", 200))
torch.manual_seed(0)
x_0, noise = torch.randn(2, 100_000, 1, dtype=torch.float64)
t = 100
x_t = process.q_sample(x_0, t, noise)
best = float(l_simple(process.one_minus_alpha_bar(t).sqrt() * x_t, noise).mean())
of_zero = float(l_simple(torch.zeros_like(noise), noise).mean())
alpha_bar = float(process.alpha_bar(t))
print(
    f"loss of 0: {of_zero:.3f}; of the best answer: {best:.3f}, where ᾱ_t is {alpha_bar:.3f}"
)
assert abs(of_zero - 1) < 0.02  # Eq. 14
assert abs(best - alpha_bar) < 0.02  # Eq. 14

# %% [markdown]
# <!-- en -->
# ## By hand
#
# The loop is five lines. Ten updates, to see that it runs:
# <!-- ja -->
# ## 手で書いてみる
#
# 学習ループの本体は 5 行です。動くことを確かめるために、10 回だけ更新してみます。

# %%
from diffusers import UNet2DModel
from sklearn.datasets import load_digits

images = torch.tensor(load_digits().images / 8 - 1, dtype=torch.float32)[:, None]
unet = UNet2DModel(
    sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32),
    layers_per_block=1, norm_num_groups=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
losses = []
for _ in range(10):  # Algorithm 1
    x_0 = images[torch.randint(len(images), (64,))]
    t, noise = torch.randint(200, (64,)), torch.randn_like(x_0)
    loss = l_simple(unet(process.q_sample(x_0, t, noise), t).sample, noise).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(float(loss))
print(f"loss: {losses[0]:.2f} at first, {losses[-1]:.2f} after ten updates")
assert losses[-1] < losses[0]  # Algorithm 1

# %% [markdown]
# <!-- en -->
# ## With the trainer
#
# [`train`][ddpm_hf.training.loop.train] is the same loop with what a real run needs: a moving average of the weights to
# sample with (EMA: 0.9999 of the old and 0.0001 of the new in the paper; faster here, for a short run), a learning rate that rises and falls, checkpoints, and a resume that is exact. On the command line it is `ddpm-hf train`.
# The later pages use this model.
# <!-- ja -->
# ## トレーナーを使う
#
# [`train`][ddpm_hf.training.loop.train] は同じループに、実用に必要なものを加えたものです。重みの指数移動平均（EMA。論文では 0.9999、ここでは短い学習に合わせて
# 速めの値）、学習率のスケジュール、チェックポイント、そして厳密な再開。コマンドラインでは `ddpm-hf train` です。ここで作るモデルを、以降の
# ページでも使います。

# %%
MODEL = Path("walkthrough-digits")
if not (MODEL / "model_index.json").is_file():
    train(TrainConfig(
        dataset_name="digits", resolution=8, channels=1, center_crop=True,
        output_dir=str(MODEL),
        unet={
            "block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        },
        ddpm_num_steps=200, ddpm_beta_schedule="squaredcos_cap_v2",
        ddpm_num_inference_steps=50,
        train_batch_size=64, max_train_steps=500, learning_rate=2e-3, lr_warmup_steps=50,
        adam_beta1=0.9, adam_beta2=0.99, use_ema=True, ema_max_decay=0.99,
        checkpointing_steps=10_000, save_images_steps=0, report_to=["none"],
        calibration_images=64,  # measures the error of x̂_0, for page 9
    ))  # fmt: skip

# %%
import json

log = [
    json.loads(line)
    for line in (MODEL / "logs" / "train.jsonl").read_text("utf-8").splitlines()
]
log = [entry for entry in log if "loss" in entry]
last = sum(entry["loss"] for entry in log[-20:]) / len(log[-20:])
print(f"loss: {last:.3f} at the end")
assert last < 0.25  # Algorithm 1
plt.figure(figsize=(6, 2.4))
plt.semilogy(
    [entry["step"] for entry in log], [entry["loss"] for entry in log], linewidth=0.6
)
plt.xlabel("update")
plt.title("L_simple")

# %%
pipe = load_pipeline(str(MODEL))
pipe.set_progress_bar_config(disable=True)
samples = pipe(
    20, [torch.Generator().manual_seed(i) for i in range(20)], output_type="pt"
).images
real = images[torch.randperm(len(images))[:20]] / 2 + 0.5
fig, axes = plt.subplots(1, 2, figsize=(9, 3.6))
for axis, title, batch in zip(
    axes, ("samples", "real scans"), (samples, real), strict=True
):
    tiles = torch.nn.functional.pad(batch[:, 0], (1, 1, 1, 1), value=1)
    axis.imshow(
        tiles.reshape(4, 5, 10, 10).permute(0, 2, 1, 3).reshape(40, 50), cmap="gray"
    )
    axis.set_title(title)
    axis.set_axis_off()

# %% [markdown] tags=["exercise"]
# <!-- en -->
# At which times is the loss of the trained network large, and why?
# <!-- ja -->
# 学習済みのネットワークの損失が大きいのは、どの時刻でしょうか。理由も考えてください。

# %% [markdown] tags=["solution"]
# <!-- en -->
# Where little noise is in the image: then noise and detail look alike. At late times nearly all of $x_t$ *is* the noise, and the
# network only has to copy its input.
# <!-- ja -->
# ノイズがわずかしか乗っていない時刻です。そこではノイズと画像の細部が区別しにくいからです。逆に終盤では $x_t$ のほとんどが**ノイズそのもの**なので、
# 入力をほぼそのまま出力すればよいのです。

# %% tags=["solution"]
torch.manual_seed(1)
with torch.no_grad():
    by_time = []
    for t in (0, 20, 60, 120, 190):
        x_0 = images[:256]
        noise = torch.randn_like(x_0)
        x_t = process.q_sample(x_0, t, noise)
        by_time.append(float(l_simple(pipe.unet(x_t, t).sample, noise).mean()))
print([f"{loss:.3f}" for loss in by_time])
assert by_time[0] > by_time[2] > by_time[4]
