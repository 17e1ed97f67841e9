# %% [markdown]
# <!-- en -->
# # 7. Sampling
#
# To make an image, start from noise and undo the process step by step, with the network in the place of the true noise.
# <!-- ja -->
# # 7. サンプリング
#
# 画像を作るには、ノイズから出発して拡散過程を 1 ステップずつ逆にたどります。本当のノイズの代わりにネットワークの予測を使います。

# %% [markdown]
# <!-- en -->
# ## Algorithm 2
#
# From $x_T \sim \mathcal{N}(0, I)$, for $t = T, …, 1$:
#
# $$x_{t-1} = \frac{1}{\sqrt{\alpha_t}} \left( x_t - \frac{\beta_t}{\sqrt{1 - \bar\alpha_t}} \epsilon_\theta(x_t, t) \right) + \sigma_t z, \qquad z \sim \mathcal{N}(0, I)$$
#
# with $z = 0$ in the last step. The mean is (11). The same mean in two steps, which is how the code does it: guess the image, then take the posterior (7) at that guess.
#
# $$\hat x_0 = \frac{x_t - \sqrt{1 - \bar\alpha_t}\, \epsilon_\theta(x_t, t)}{\sqrt{\bar\alpha_t}} \qquad (15)$$
#
# This is (4), solved for $x_0$. Guess and mean are equivalent by the proof of (10); but a guess can be *looked at*, and clipped to $[-1, 1]$.
# <!-- ja -->
# ## アルゴリズム 2
#
# $x_T \sim \mathcal{N}(0, I)$ から始め、$t = T, …, 1$ の順に次を計算します。
#
# $$x_{t-1} = \frac{1}{\sqrt{\alpha_t}} \left( x_t - \frac{\beta_t}{\sqrt{1 - \bar\alpha_t}} \epsilon_\theta(x_t, t) \right) + \sigma_t z, \qquad z \sim \mathcal{N}(0, I)$$
#
# ただし最後のステップでは $z = 0$ とします。平均は式 (11) です。コードでは同じ平均を 2 段階で求めます。まず元の画像を推定し、その推定値を
# 事後分布 (7) に代入するのです。
#
# $$\hat x_0 = \frac{x_t - \sqrt{1 - \bar\alpha_t}\, \epsilon_\theta(x_t, t)}{\sqrt{\bar\alpha_t}} \qquad (15)$$
#
# これは式 (4) を $x_0$ について解いたものです。二つの書き方が同値であることは式 (10) の証明で示しました。しかし推定値 $\hat x_0$ には、**目で見られる**、
# そして $[-1, 1]$ に切り詰められる、という利点があります。

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from ddpm_hf import load_pipeline

assert Path("walkthrough-digits").is_dir(), (
    "run the page about training first: it makes this model"
)
pipe = load_pipeline("walkthrough-digits")
pipe.set_progress_bar_config(disable=True)
process = pipe.scheduler.process

torch.manual_seed(0)
t, x_t = 120, torch.randn(4, 1, 8, 8, dtype=torch.float64)
with torch.no_grad():
    eps = pipe.unet(x_t.float(), t).sample.double()
alpha, alpha_bar, beta = 1 - process.beta(t), process.alpha_bar(t), process.beta(t)
mean = (x_t - beta / (1 - alpha_bar).sqrt() * eps) / alpha.sqrt()
reverse = process.p_mean_variance(eps, x_t, t)  # without clipping
x_0_hat = (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
print(f"the two forms of the mean differ by {float((reverse.mean - mean).abs().max()):.1e}")
assert (reverse.mean - mean).abs().max() < 1e-10  # Eq. 11
assert (process.predict_x0(eps, x_t, t) - x_0_hat).abs().max() < 1e-10  # Eq. 15

# %% [markdown]
# <!-- en -->
# ## The loop
#
# Written by hand, with the scheduler's [`step`][ddpm_hf.diffusion.scheduling_ddpm_custom.DDPMSchedulerCustom.step], it gives the images of the pipeline:
# <!-- ja -->
# ## ループを書く
#
# スケジューラの [`step`][ddpm_hf.diffusion.scheduling_ddpm_custom.DDPMSchedulerCustom.step] を使って手で書いたループは、パイプラインと同じ画像を作ります。


# %%
def generators():
    return [torch.Generator().manual_seed(i) for i in range(4)]


with torch.no_grad():  # Algorithm 2
    random = generators()
    x = torch.stack([torch.randn(1, 8, 8, generator=g) for g in random])
    pipe.scheduler.set_timesteps(200)
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(pipe.unet(x, t).sample, t, x, generator=random).prev_sample
made = pipe(4, generators(), output_type="latent", trajectory_every=20)
print(f"by hand and by the pipeline: difference {float((x - made.images).abs().max()):.1e}")
assert (x - made.images).abs().max() < 1e-4  # Algorithm 2

rows = [part[:, i, 0] for i in range(2) for part in (made.trajectory, made.trajectory_x_0)]
fig, axes = plt.subplots(len(rows), len(rows[0]), figsize=(10, 4.2))
for row, images in enumerate(rows):
    for column, image in enumerate(images):
        axes[row, column].imshow(image, cmap="gray", vmin=-1, vmax=1)
        axes[row, column].set_xticks([])
        axes[row, column].set_yticks([])
        axes[0, column].set_title(f"t = {made.trajectory_timesteps[column]}", fontsize=8)
    axes[row, 0].set_ylabel("x_0 guess" if row % 2 else "x_t", fontsize=8)

# %% [markdown]
# <!-- en -->
# ## Which variance?
#
# The paper names two: $\sigma_t^2 = \beta_t$ is right if the data are $\mathcal{N}(0, I)$, and $\sigma_t^2 = \tilde\beta_t$ if they are a single
# point (Section 3.2). Both can be checked by following one number, the variance of $x_t$, down the chain with the best possible network.
#
# Between the two, a network can also learn it (`learned_range`: $\log \sigma_t^2 = w \log \beta_t + (1 - w) \log \tilde\beta_t$, [arXiv 2102.09672](https://arxiv.org/abs/2102.09672)).
#
# *Normal data.* $\epsilon^* = \sqrt{1 - \bar\alpha_t}\, x_t$ makes the mean $\frac{1}{\sqrt{\alpha_t}} (1 - \beta_t) x_t = \sqrt{\alpha_t}\, x_t$, and with
# $\sigma_t^2 = \beta_t$ the variance stays $\alpha_t \cdot 1 + \beta_t = 1$. *A point $m$.* The best guess is $\hat x_0 = m$; with $\tilde\beta_t$ each step is
# the true posterior, so $x_{t-1}$ is distributed as $q(x_{t-1} \mid x_0 = m)$, and ends at $m$.
# <!-- ja -->
# ## 分散はどう選ぶか
#
# 論文は二つの選択肢を挙げています（3.2 節）。データが $\mathcal{N}(0, I)$ なら $\sigma_t^2 = \beta_t$ が、データがただ 1 点なら $\sigma_t^2 = \tilde\beta_t$ が
# 正解です。どちらも、理想的なネットワークを仮定して $x_t$ の分散という一つの数を追いかければ確かめられます。
#
# 両者の間の値をネットワークに学習させることもできます（`learned_range`: $\log \sigma_t^2 = w \log \beta_t + (1 - w) \log \tilde\beta_t$、[arXiv 2102.09672](https://arxiv.org/abs/2102.09672)）。
#
# **正規分布のデータ。** $\epsilon^* = \sqrt{1 - \bar\alpha_t}\, x_t$ とすると平均は $\frac{1}{\sqrt{\alpha_t}} (1 - \beta_t) x_t = \sqrt{\alpha_t}\, x_t$ となり、
# $\sigma_t^2 = \beta_t$ なら分散は $\alpha_t \cdot 1 + \beta_t = 1$ のまま保たれます。**1 点 $m$ のデータ。** 最良の推定は $\hat x_0 = m$ です。$\tilde\beta_t$ を使えば各ステップが
# 真の事後分布になるので、$x_{t-1}$ は $q(x_{t-1} \mid x_0 = m)$ に従い、最後は $m$ に到達します。

# %%
variances, halfway = {}, 100
for data in ("normal", "point"):
    for choice in ("fixed_large", "fixed_small"):
        variance = 1.0
        for t in reversed(range(halfway + 1, 200)):
            unit = torch.ones(1, 1, dtype=torch.float64)
            if data == "normal":
                output = process.one_minus_alpha_bar(t).sqrt() * unit
            else:  # the noise that leads from m = 0 to x_t
                output = unit / process.one_minus_alpha_bar(t).sqrt()
            reverse = process.p_mean_variance(output, unit, t, variance_type=choice)
            variance = reverse.mean.item() ** 2 * variance + reverse.variance.item()
        variances[data, choice] = variance
right = {"normal": 1.0, "point": float(process.one_minus_alpha_bar(halfway))}
for (data, choice), variance in variances.items():
    print(
        f"{data:6} data, {choice}: variance {variance:.4f}, and {right[data]:.4f} is right"
    )
assert abs(variances["normal", "fixed_large"] - 1) < 1e-6  # Section 3.2
assert abs(variances["point", "fixed_small"] - right["point"]) < 1e-6  # Section 3.2
assert abs(variances["normal", "fixed_small"] - 1) > 1e-3
assert abs(variances["point", "fixed_large"] - right["point"]) > 1e-3

half = process.p_log_variance(100, None, "learned_range", torch.zeros(1))  # w = 1/2
small, large = process.posterior_coefficients(100)[2], process.beta(100)
assert abs(half.item() - (small.log() + large.log()).item() / 2) < 1e-5

# %% [markdown] tags=["exercise"]
# <!-- en -->
# What happens if noise is added in the last step, too? Work out the standard deviation for point data, in grey levels of 255.
# <!-- ja -->
# 最後のステップでもノイズを加えたらどうなるでしょうか。1 点のデータについて、結果の標準偏差を 255 階調の単位で求めてください。

# %% tags=["solution"]
std = float(process.beta(0).sqrt()) * 127.5
print(f"a standard deviation of {std:.2f} levels: a light grain on every image")
assert 1 < std < 5
