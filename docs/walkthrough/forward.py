# %% [markdown]
# <!-- en -->
# # 1. The forward process
#
# A diffusion model learns to undo a process that destroys images. This page is about that process, which has nothing to
# learn: it adds a little Gaussian noise, $T$ times.
#
# You need to know what a Gaussian is, and some PyTorch. Nothing has to be believed: every statement is derived, and every
# derivation is checked by a number, with `assert`.
# <!-- ja -->
# # 1. 拡散過程
#
# 拡散モデルは、画像を少しずつ壊していく過程を逆にたどることを学習します。このページで扱うのは、その「壊す」側、つまり
# **拡散過程**（forward process）です。学習するものは何もなく、ガウスノイズを少しずつ $T$ 回加えるだけです。
#
# 必要な予備知識は、ガウス分布と PyTorch の基本だけです。主張はすべて導出し、導出はすべて `assert` で数値的に確かめます。

# %% [markdown]
# <!-- en -->
# ## The statement
#
# From an image $x_0$ with pixels in $[-1, 1]$, each step shrinks what it gets and adds noise of variance $\beta_t$:
#
# $$q(x_t \mid x_{t-1}) = \mathcal{N}(\sqrt{1 - \beta_t}\, x_{t-1}, \beta_t I), \quad q(x_{1:T} \mid x_0) = \prod_{t=1}^T q(x_t \mid x_{t-1}) \qquad (2)$$
#
# The model is a chain that runs the other way. It starts from pure noise $p(x_T) = \mathcal{N}(0, I)$:
#
# $$p_\theta(x_{0:T}) = p(x_T) \prod_{t=1}^T p_\theta(x_{t-1} \mid x_t), \quad p_\theta(x_{t-1} \mid x_t) = \mathcal{N}(\mu_\theta(x_t, t), \Sigma_\theta(x_t, t)) \qquad (1)$$
#
# Numbers of equations are those of [Ho, Jain and Abbeel (2020)](https://arxiv.org/abs/2006.11239). In code, times start
# at 0: `t` is the paper's $t - 1$, and the clean image is at `t = -1`.
# <!-- ja -->
# ## 定義
#
# 画素値が $[-1, 1]$ の画像 $x_0$ から出発し、各ステップで少し縮めてから分散 $\beta_t$ のノイズを加えます。
#
# $$q(x_t \mid x_{t-1}) = \mathcal{N}(\sqrt{1 - \beta_t}\, x_{t-1}, \beta_t I), \quad q(x_{1:T} \mid x_0) = \prod_{t=1}^T q(x_t \mid x_{t-1}) \qquad (2)$$
#
# モデルはこれを逆向きにたどるマルコフ連鎖、**逆過程**（reverse process）です。純粋なノイズ $p(x_T) = \mathcal{N}(0, I)$ から始まります。
#
# $$p_\theta(x_{0:T}) = p(x_T) \prod_{t=1}^T p_\theta(x_{t-1} \mid x_t), \quad p_\theta(x_{t-1} \mid x_t) = \mathcal{N}(\mu_\theta(x_t, t), \Sigma_\theta(x_t, t)) \qquad (1)$$
#
# 式番号は [Ho, Jain, Abbeel (2020)](https://arxiv.org/abs/2006.11239) のものです。コードでは時刻を 0 から数えます。
# つまりコードの `t` は論文の $t - 1$ で、ノイズのない画像は `t = -1` にあたります。

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

from ddpm_hf import DDPMProcess
from ddpm_hf.diffusion.ddpm_process import make_betas

betas = make_betas("linear", 1000)
process = DDPMProcess(betas)  # has the equations of all pages as methods
assert abs(float(betas[0]) - 1e-4) < 1e-12  # Section 4
assert abs(float(betas[-1]) - 0.02) < 1e-12  # Section 4

scan = torch.tensor(load_digits().images[5])  # 8×8, a real one, from 0 to 16
x_0 = scan[None, None] / 8 - 1  # (B, C, H, W), in [-1, 1]
step = process.q_step_mean_variance(x_0, 0)
assert torch.allclose(step.mean, (1 - betas[0]).sqrt() * x_0)  # Eq. 2
assert abs(float(step.variance) - 1e-4) < 1e-12  # Eq. 2
print(f"the first step keeps {float((1 - betas[0]).sqrt()):.6f} of the image")

# %% [markdown]
# <!-- en -->
# ## Why the square root
#
# The factor $\sqrt{1 - \beta_t}$ keeps the scale. If the components of $x_{t-1}$ have variance 1, so have those of $x_t$,
# since the noise $\epsilon$ is independent of $x_{t-1}$:
#
# $$\mathrm{Var}(x_t) = \mathrm{Var}(\sqrt{1 - \beta_t}\, x_{t-1} + \sqrt{\beta_t}\, \epsilon) = (1 - \beta_t) \cdot 1 + \beta_t \cdot 1 = 1$$
#
# If the variance is $v$ instead, then $\mathrm{Var}(x_t) - 1 = (1 - \beta_t)(v - 1)$: every step brings it nearer to 1. The
# mean shrinks by $\sqrt{1 - \beta_t}$ each time. So whatever the images were, what remains after many steps has mean 0 and
# variance 1. [`q_step`][P.q_step] draws a step.
# <!-- ja -->
# ## なぜ平方根なのか
#
# 係数 $\sqrt{1 - \beta_t}$ はスケールを保つためにあります。$x_{t-1}$ の各成分の分散が 1 なら、ノイズ $\epsilon$ は $x_{t-1}$ と
# 独立なので、$x_t$ の分散も 1 のままです。
#
# $$\mathrm{Var}(x_t) = \mathrm{Var}(\sqrt{1 - \beta_t}\, x_{t-1} + \sqrt{\beta_t}\, \epsilon) = (1 - \beta_t) \cdot 1 + \beta_t \cdot 1 = 1$$
#
# 分散が 1 でなく $v$ のときは $\mathrm{Var}(x_t) - 1 = (1 - \beta_t)(v - 1)$ となり、ステップごとに 1 へ近づきます。平均も毎回
# $\sqrt{1 - \beta_t}$ 倍に縮みます。したがって、どんな画像から始めても、十分に進めば平均 0、分散 1 になります。1 ステップ分の
# サンプリングは [`q_step`][P.q_step] が行います。

# %%
variance = 0.3  # of the images, say
for beta in betas.tolist():
    variance = (1 - beta) * variance + beta
print(f"variance after 1000 steps, from 0.3: {variance:.6f}")
assert abs(variance - 1) < 1e-4

torch.manual_seed(0)
x, strip = x_0, [x_0]
for t in range(1000):
    x = process.q_step(x, t, torch.randn_like(x))
    if t % 125 == 124:
        strip.append(x)
fig, axes = plt.subplots(1, len(strip), figsize=(11, 1.6))
for i, (axis, image) in enumerate(zip(axes, strip, strict=True)):
    axis.imshow(image[0, 0], cmap="gray", vmin=-1, vmax=1)
    axis.set_title(f"t = {125 * i}")
    axis.set_axis_off()

# %% [markdown]
# <!-- en -->
# ## The two chains can be one
#
# Equations (1) and (2) factorise a distribution of whole paths $x_0, …, x_T$ in opposite directions. For a world simple
# enough, both give *the same* distribution. Let the data be $x_0 \sim \mathcal{N}(0, 1)$. Then every $x_t$ has variance 1,
# every pair $(x_{t-1}, x_t)$ is Gaussian with covariance $\sqrt{1 - \beta_t}$, and a pair of equal variances looks the same
# from both sides: $p(x_{t-1} \mid x_t) = \mathcal{N}(\sqrt{1 - \beta_t}\, x_t, \beta_t)$. For one random path we compare the
# two products:
# <!-- ja -->
# ## 二つの連鎖は一致しうる
#
# 式 (1) と式 (2) は、経路 $x_0, …, x_T$ 全体の分布を互いに逆向きに分解したものです。十分に単純な世界では、両者は**同じ**分布に
# なります。データが $x_0 \sim \mathcal{N}(0, 1)$ に従うとしましょう。すると、どの $x_t$ も分散 1 で、組 $(x_{t-1}, x_t)$ は共分散
# $\sqrt{1 - \beta_t}$ のガウス分布です。分散が等しい組はどちらから見ても同じ形なので、
# $p(x_{t-1} \mid x_t) = \mathcal{N}(\sqrt{1 - \beta_t}\, x_t, \beta_t)$ となります。ランダムな経路を一つ取り、二つの積を比べます。

# %%
from torch.distributions import Normal

path = [torch.randn(1, dtype=torch.float64)]
for t in range(1000):
    path.append(process.q_step(path[-1], t, torch.randn(1, dtype=torch.float64)))

forward = Normal(0, 1).log_prob(path[0])  # log q(x_0)
reverse = Normal(0, 1).log_prob(path[-1])  # log p(x_T)
for t in range(1000):
    scale, std = (1 - betas[t]).sqrt(), betas[t].sqrt()
    forward = forward + Normal(scale * path[t], std).log_prob(path[t + 1])  # Eq. 2
    reverse = reverse + Normal(scale * path[t + 1], std).log_prob(path[t])  # Eq. 1
print(f"log q(x_0:T) = {float(forward):.6f}, log p(x_0:T) = {float(reverse):.6f}")
assert abs(float(forward - reverse)) < 1e-6  # Eq. 1

# %% [markdown] tags=["exercise"]
# <!-- en -->
# After how many steps has the mean of $x_t$ shrunk to half of $x_0$, and after how many to one hundredth?
# <!-- ja -->
# $x_t$ の平均が $x_0$ の半分になるのは何ステップ後でしょうか。また、100 分の 1 になるのは何ステップ後でしょうか。

# %% [markdown] tags=["solution"]
# <!-- en -->
# Each step multiplies the mean by $\sqrt{1 - \beta_t}$; the product is $\sqrt{\bar\alpha_t}$, which the next page is about.
# <!-- ja -->
# 平均はステップごとに $\sqrt{1 - \beta_t}$ 倍になります。その積が次のページの主役 $\sqrt{\bar\alpha_t}$ です。

# %% tags=["solution"]
mean = torch.cumprod((1 - betas).sqrt(), dim=0)
half, hundredth = int((mean > 0.5).sum()) + 1, int((mean > 0.01).sum()) + 1
print(half, hundredth)
assert (half, hundredth) == (369, 955)
