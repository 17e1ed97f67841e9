# %% [markdown]
# <!-- en -->
# # 8. Likelihood
#
# How probable are real images under the model? The bound of [the loss](loss.md) answers in bits per dimension, and reads as a code:
# how many bits it takes to send an image, step by step.
# <!-- ja -->
# # 8. 尤度
#
# 本物の画像は、モデルのもとでどれほど「ありそう」でしょうか。[損失関数のページ](loss.md)の変分下界が、1 次元あたりのビット数（bits/dim）で答えてくれます。
# これは符号としても読めます。画像を少しずつ送るのに何ビット必要か、という見方です。

# %% [markdown]
# <!-- en -->
# ## The last step: a discrete decoder
#
# Pixels are whole numbers 0, …, 255, mapped to 256 equally spaced values in $[-1, 1]$. A density can't be a probability of those, so the last
# step gives each value the mass of the Gaussian in its bin, and to the outermost two the tails:
#
# $$p_\theta(x_0 \mid x_1) = \prod_{i=1}^D \int_{\delta_-(x_0^i)}^{\delta_+(x_0^i)} \mathcal{N}(x; \mu_\theta^i(x_1, 1), \sigma_1^2)\, dx \qquad (13)$$
#
# with $\delta_\pm(x) = x \pm \frac{1}{255}$, but $\delta_+(1) = \infty$ and $\delta_-(-1) = -\infty$.
# The bins cover the line without gap or overlap, so the 256 probabilities sum to 1: the bound is one for discrete images, of a lossless code.
# [`discretized_gaussian_log_likelihood`][M.discretized_gaussian_log_likelihood] is (13), exact even far out in the tails.
# <!-- ja -->
# ## 最後のステップ：離散的なデコーダ
#
# 画素は 0, …, 255 の整数で、$[-1, 1]$ の等間隔な 256 個の値に対応します。確率密度はそのままでは離散値の確率になりません。そこで最後のステップでは、
# 各値の区間（ビン）に入るガウス分布の確率を割り当て、両端の値には裾をすべて割り当てます。
#
# $$p_\theta(x_0 \mid x_1) = \prod_{i=1}^D \int_{\delta_-(x_0^i)}^{\delta_+(x_0^i)} \mathcal{N}(x; \mu_\theta^i(x_1, 1), \sigma_1^2)\, dx \qquad (13)$$
#
# ここで $\delta_\pm(x) = x \pm \frac{1}{255}$、ただし $\delta_+(1) = \infty$、$\delta_-(-1) = -\infty$ です。
# 区間は実数直線を隙間も重なりもなく覆うので、256 個の確率の和は 1 になります。つまり、これは離散的な画像に対する下界であり、可逆圧縮の符号長に対応します。
# 式 (13) を実装しているのが [`discretized_gaussian_log_likelihood`][M.discretized_gaussian_log_likelihood] で、分布の裾の先でも正確です。

# %%
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

from ddpm_hf import DDPMProcess, bits_per_dim, load_pipeline, rate_distortion
from ddpm_hf.diffusion.ddpm_process import (
    Gaussian,
    discretized_gaussian_log_likelihood,
    make_betas,
)

grid = torch.linspace(-1, 1, 256, dtype=torch.float64)
for mean, std in ((0.0, 0.01), (0.3, 0.2), (0.999, 1e-4)):
    log_p = discretized_gaussian_log_likelihood(
        grid, torch.tensor(mean), 2 * torch.tensor(std).log()
    )
    total = float(log_p.exp().sum())
    print(f"mean {mean}, std {std}: the 256 probabilities sum to {total:.12f}")
    assert abs(total - 1) < 1e-9  # Eq. 13

x_0, std = grid[None, 60:190], 0.02  # all at the centre of their Gaussian
log_variance = torch.full_like(x_0, 2 * math.log(std))
bits = DDPMProcess([0.1]).L_0(x_0, Gaussian(x_0, log_variance.exp(), log_variance))
expected = -math.log2(math.erf(1 / 255 / (std * 2**0.5)))
print(f"L_0 at the centre: {bits.item():.6f} bits/dim; by erf: {expected:.6f}")
assert abs(bits.item() - expected) < 1e-6  # Eq. 13

# %% [markdown]
# <!-- en -->
# ## The first term
#
# $L_T$ compares $q(x_T \mid x_0)$ with pure noise, and has no parameters. By (4) and the [KL divergence of two Gaussians](loss.md), of variances
# $1 - \bar\alpha_T$ and 1, it is $-\frac{1}{2} \log(1 - \bar\alpha_T)$ for a pixel of $\pm 1$: next to nothing. [`L_T`][P.L_T] gives bits/dim: nats over $\log 2$.
# <!-- ja -->
# ## 最初の項
#
# $L_T$ は $q(x_T \mid x_0)$ と純粋なノイズを比べる項で、パラメータを含みません。式 (4) と[ガウス分布どうしの KL ダイバージェンス](loss.md)の式（分散は
# $1 - \bar\alpha_T$ と 1）より、値が $\pm 1$ の画素では $-\frac{1}{2} \log(1 - \bar\alpha_T)$ となり、ほぼゼロです。[`L_T`][P.L_T] はこれを bits/dim（ナットを $\log 2$ で割った値）で返します。

# %%
linear = DDPMProcess(make_betas("linear", 1000))
L_T = float(linear.L_T(torch.ones(1, 1, 8, 8)))
print(f"L_T of the paper's schedule: {L_T:.3e} bits/dim")
assert abs(L_T / 2.911e-05 - 1) < 1e-3  # Eq. 5

# %% [markdown]
# <!-- en -->
# ## All terms
#
# [`bits_per_dim`][ddpm_hf.evaluation.likelihood.bits_per_dim] measures every term of (5) on real images, and
# [`rate_distortion`][ddpm_hf.evaluation.likelihood.rate_distortion] reads them as Fig. 5 of the paper does: after each step the receiver knows $x_t$,
# has paid the terms so far (the *rate*), and guesses $\hat x_0$ by (15), with an error (the *distortion*).
# <!-- ja -->
# ## すべての項
#
# [`bits_per_dim`][ddpm_hf.evaluation.likelihood.bits_per_dim] は実画像について式 (5) の各項を測り、[`rate_distortion`][ddpm_hf.evaluation.likelihood.rate_distortion] は
# それを論文の図 5 のように読み替えます。各ステップの後、受信者は $x_t$ を知り、そこまでの項の和（**レート**）を支払い、式 (15) で $\hat x_0$ を推定します。
# その誤差が**歪み**（ディストーション）です。

# %%
assert Path("walkthrough-digits").is_dir(), (
    "run the page about training first: it makes this model"
)
pipe = load_pipeline("walkthrough-digits")
images = (load_digits().images[:, None] * (255 / 16)).round()
images = torch.tensor(images, dtype=torch.uint8)
bits = bits_per_dim(pipe, images, num_images=16, show_progress=False)
rate = bits.total - bits.L_0 - bits.L_T
print(f"{bits.total:.2f} ± {bits.standard_error:.2f} bits/dim")
print(f"= L_T {bits.L_T:.1e} + rate {rate:.2f} + L_0 {bits.L_0:.2f}")
assert abs(bits.L_T + float(bits.terms.sum()) - bits.total) < 1e-6  # Eq. 5
assert bits.total < 8  # a code that knows nothing takes 8

curve = rate_distortion(bits)
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
left.plot(curve.timesteps, curve.distortion)
left.invert_xaxis()
left.set_xlabel("t")
left.set_ylabel("distortion (RMSE)")
right.plot(curve.rate, curve.distortion)
right.set_xlabel("rate (bits/dim)")
assert (curve.rate.diff() > -1e-9).all()  # bits are only ever paid

# %% [markdown] tags=["exercise"]
# <!-- en -->
# The scans have only 17 grey levels. How many bits/dim does the best code take that treats pixels as independent and knows how
# often each level occurs? Is the model better?
# <!-- ja -->
# このデータの画素には 17 通りの濃さしかありません。各画素を独立とみなし、それぞれの濃さの頻度だけを知っている最良の符号は、何 bits/dim になるでしょうか。
# モデルはそれより優れていますか。

# %% [markdown] tags=["solution"]
# <!-- en -->
# It is the entropy of the histogram. The model does not know about the 17 levels, and has to find each among 256; what a bound in bits/dim says
# depends on such things, too.
# <!-- ja -->
# 答えはヒストグラムのエントロピーです。モデルは濃さが 17 通りしかないことを知らず、256 通りの中から探さなければなりません。bits/dim の値は、こうした事情にも
# 左右されます。

# %% tags=["solution"]
share = torch.bincount(images.flatten().long(), minlength=256) / images.numel()
share = share[share > 0]
entropy = -float((share * share.log2()).sum())
print(f"{len(share)} levels: {entropy:.2f} bits per pixel; the model: {bits.total:.2f}")
assert len(share) == 17
assert entropy < torch.log2(torch.tensor(17.0))
