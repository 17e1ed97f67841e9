# %% [markdown]
# <!-- en -->
# # 12. The unified view
#
# Three pictures of one thing, after Luo, *Understanding Diffusion Models: A Unified Perspective* ([arXiv 2208.11970](https://arxiv.org/abs/2208.11970)): a hierarchical VAE; a network that
# predicts the image, the noise, or the score; and a differential equation. Each is checked in a plane, where all can be computed and drawn.
# <!-- ja -->
# # 12. 統一的な見方
#
# 同じものを三つの角度から眺めます。Luo の解説 *Understanding Diffusion Models: A Unified Perspective*（[arXiv 2208.11970](https://arxiv.org/abs/2208.11970)）に沿って、階層的な VAE として、
# 画像・ノイズ・スコアのどれを予測してもよいネットワークとして、そして微分方程式として。いずれも、すべてを計算でき図にもできる平面上の例で確かめます。

# %% [markdown]
# <!-- en -->
# ## A hierarchical VAE whose encoder has nothing to learn
#
# A variational autoencoder (VAE) is a generator $p$ of images from latent variables, trained together with an encoder $q$ from images to these, on a lower bound of the log likelihood, the ELBO
# (evidence lower bound). With latents $x_1, …, x_T$ it is $\log p(x_0) \geq \mathbb{E}_q [\log p(x_{0:T}) - \log q(x_{1:T} \mid x_0)]$, which is (3) with the sign turned. A DDPM is that VAE with three restrictions:
# latents have the size of the data; the encoder $q(x_t \mid x_{t-1})$ is a fixed Gaussian; its end $q(x_T)$ is standard normal. So (5) is the ELBO: a *reconstruction* term $L_0$, a *prior matching* term
# $L_T$ without parameters, and *denoising matching* terms $L_{t-1}$, each of which asks one decoder to imitate the encoder's posterior. [The loss](loss.md) has the numbers.
#
# ## Three readings of the network
#
# By (4), $x_0$ and $\epsilon$ determine each other, given $x_t$, and so does their mixture $v = \sqrt{\bar\alpha_t}\, \epsilon - \sqrt{1 - \bar\alpha_t}\, x_0$, which some networks predict
# ([arXiv 2202.00512](https://arxiv.org/abs/2202.00512)): $x_0 = \sqrt{\bar\alpha_t}\, x_t - \sqrt{1 - \bar\alpha_t}\, v$ and $\epsilon = \sqrt{1 - \bar\alpha_t}\, x_t + \sqrt{\bar\alpha_t}\, v$. The third reading is the score. Differentiate $q(x_t) = \int q(x_t \mid x_0)\, q(x_0)\, dx_0$ under the integral:
#
# $$\nabla \log q(x_t) = \frac{1}{q(x_t)} \int \nabla q(x_t \mid x_0)\, q(x_0)\, dx_0 = \mathbb{E} \left[ -\frac{x_t - \sqrt{\bar\alpha_t}\, x_0}{1 - \bar\alpha_t} \,\middle|\, x_t \right] = -\frac{\mathbb{E}[\epsilon \mid x_t]}{\sqrt{1 - \bar\alpha_t}}$$
#
# since $\nabla q(x_t \mid x_0) = -q(x_t \mid x_0) (x_t - \sqrt{\bar\alpha_t}\, x_0) / (1 - \bar\alpha_t)$, and the fraction is $\epsilon / \sqrt{1 - \bar\alpha_t}$. The best prediction in mean square is the conditional
# mean, so the best $\epsilon_\theta$ is the score, scaled; solved for $x_0$ that is Tweedie's formula, $\mathbb{E}[x_0 \mid x_t] = (x_t + (1 - \bar\alpha_t) \nabla \log q(x_t)) / \sqrt{\bar\alpha_t}$. ∎
# <!-- ja -->
# ## 学習しないエンコーダを持つ階層的 VAE
#
# 変分オートエンコーダ（VAE）は、潜在変数から画像を作る生成器 $p$ と、画像から潜在変数へのエンコーダ $q$ を、対数尤度の下界 ELBO（evidence lower bound）によって一緒に学習するものです。潜在変数が $x_1, …, x_T$ のとき、ELBO は $\log p(x_0) \geq \mathbb{E}_q [\log p(x_{0:T}) - \log q(x_{1:T} \mid x_0)]$ で、これは式 (3) の符号を変えたものです。DDPM はこの VAE に三つの制約を
# 課したものと見なせます。潜在変数の次元がデータと同じであること、エンコーダ $q(x_t \mid x_{t-1})$ が固定されたガウス分布であること、終端 $q(x_T)$ が標準正規分布であること。したがって式 (5) は ELBO そのもので、
# **再構成**項 $L_0$、パラメータのない**事前分布との一致**項 $L_T$、そして各デコーダにエンコーダの事後分布を真似させる**ノイズ除去の一致**項 $L_{t-1}$ からなります。数値は[損失関数](loss.md)のページにあります。
#
# ## ネットワークの三つの読み方
#
# 式 (4) より、$x_t$ が与えられれば $x_0$ と $\epsilon$ は互いに相手を決めます。両者を混ぜた $v = \sqrt{\bar\alpha_t}\, \epsilon - \sqrt{1 - \bar\alpha_t}\, x_0$ を予測するネットワークもあり（[arXiv 2202.00512](https://arxiv.org/abs/2202.00512)）、
# $x_0 = \sqrt{\bar\alpha_t}\, x_t - \sqrt{1 - \bar\alpha_t}\, v$、$\epsilon = \sqrt{1 - \bar\alpha_t}\, x_t + \sqrt{\bar\alpha_t}\, v$ で元に戻せます。三つ目の読み方がスコアです。$q(x_t) = \int q(x_t \mid x_0)\, q(x_0)\, dx_0$ を積分記号の下で微分すると、
#
# $$\nabla \log q(x_t) = \frac{1}{q(x_t)} \int \nabla q(x_t \mid x_0)\, q(x_0)\, dx_0 = \mathbb{E} \left[ -\frac{x_t - \sqrt{\bar\alpha_t}\, x_0}{1 - \bar\alpha_t} \,\middle|\, x_t \right] = -\frac{\mathbb{E}[\epsilon \mid x_t]}{\sqrt{1 - \bar\alpha_t}}$$
#
# ここで $\nabla q(x_t \mid x_0) = -q(x_t \mid x_0) (x_t - \sqrt{\bar\alpha_t}\, x_0) / (1 - \bar\alpha_t)$ と、分数が $\epsilon / \sqrt{1 - \bar\alpha_t}$ に等しいことを使いました。二乗誤差の意味で最良の予測は条件付き期待値ですから、
# 最良の $\epsilon_\theta$ はスコアの定数倍です。$x_0$ について解けば Tweedie の公式 $\mathbb{E}[x_0 \mid x_t] = (x_t + (1 - \bar\alpha_t) \nabla \log q(x_t)) / \sqrt{\bar\alpha_t}$ になります。∎

# %%
from itertools import pairwise

import matplotlib.pyplot as plt
import torch

from ddpm_hf import DDPMProcess
from ddpm_hf.diffusion.ddpm_process import make_betas

torch.set_default_dtype(torch.float64)
process = DDPMProcess(make_betas("linear", 1000))
weights = torch.tensor([0.5, 0.3, 0.2])
centres = torch.tensor([[-0.8, -0.4], [0.9, -0.3], [0.1, 0.9]])
stds = torch.tensor([0.15, 0.25, 0.2])


def log_q(x, t):
    """log q(x_t) of the mixture, at x of shape (n, 2)."""
    a = process.alpha_bar(t)
    variances = a * stds**2 + 1 - a
    squares = ((x[:, None] - a.sqrt() * centres) ** 2).sum(-1)
    return torch.logsumexp(
        weights.log() - squares / (2 * variances) - torch.log(2 * torch.pi * variances),
        dim=1,
    )


def eps(x, t):
    """The best prediction, E[ε | x_t], by Bayes' rule over the three parts."""
    a = process.alpha_bar(t)
    variances = a * stds**2 + 1 - a
    difference = x[:, None] - a.sqrt() * centres
    share = (
        weights.log() - (difference**2).sum(-1) / (2 * variances) - variances.log()
    ).softmax(1)
    return (share[..., None] * (1 - a).sqrt() * difference / variances[:, None]).sum(1)


def score(x, t):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(log_q(x, t).sum(), x)[0]


torch.manual_seed(0)
for t in (0, 50, 300, 900):
    x = 2 * torch.randn(1000, 2)
    s = score(x, t)
    predicted = -eps(x, t) / process.one_minus_alpha_bar(t).sqrt()
    x_0 = (x + process.one_minus_alpha_bar(t) * s) / process.alpha_bar(t).sqrt()
    difference = float((s - predicted).abs().max() / s.abs().max())
    print(f"t = {t:3}: score and -ε/√(1 - ᾱ) differ by {difference:.0e}")
    assert difference < 1e-10  # arXiv 2208.11970: score
    noise = eps(x, t)
    x_0_off = (process.predict_x0(noise, x, t) - x_0).abs().max()
    assert x_0_off < 1e-8  # arXiv 2208.11970: Tweedie's formula
    v = process.velocity(x_0, noise, t)
    assert (process.predict_x0(v, x, t, "v_prediction") - x_0).abs().max() < 1e-8
    for output, kind in ((v, "v_prediction"), (x_0, "sample")):
        assert (process.predict_eps(output, x, t, kind) - noise).abs().max() < 1e-8

# %%
fig, axes = plt.subplots(1, 3, figsize=(11, 3.6))
side = torch.linspace(-2.2, 2.2, 120)
plane = torch.cartesian_prod(side, side)
coarse = torch.cartesian_prod(side[::8], side[::8])
for axis, t in zip(axes, (20, 200, 500), strict=True):
    axis.contourf(
        side, side, log_q(plane, t).exp().reshape(120, 120).T, levels=12, cmap="Blues"
    )
    field = score(coarse, t)
    field = field / field.norm(dim=1, keepdim=True)
    axis.quiver(
        coarse[:, 0],
        coarse[:, 1],
        field[:, 0],
        field[:, 1],
        color="tab:red",
        width=0.004,
        scale=28,
    )
    axis.set_title(f"density and direction of the score, t = {t}", fontsize=9)
    axis.set_aspect("equal")

# %% [markdown]
# <!-- en -->
# ## A differential equation in discrete time
#
# For small $\beta_t$, $\sqrt{1 - \beta_t} = 1 - \beta_t / 2 + O(\beta_t^2)$, so a step of (2) is a step of Euler's method for $dx = -\frac{1}{2} \beta\, x\, dt + \sqrt{\beta}\, dw$,
# a drift and noise of variance $\beta\, dt$. What do they do to the density $q$? A velocity $v$ carries it along, $\partial q / \partial t = -\nabla \cdot (q v)$; noise blurs it, $\partial q / \partial t = \frac{\beta}{2} \Delta q$. But
# $\Delta q = \nabla \cdot \nabla q = \nabla \cdot (q \nabla \log q)$, so the blur is what a velocity $-\frac{\beta}{2} \nabla \log q$ would do: without any noise, the *probability flow*
# $dx/dt = -\frac{1}{2} \beta (x + \nabla \log q(x))$ has the same densities at all times.
#
# DDIM with $\eta = 0$ solves it: let $\beta$ be the $\beta_{t|s}$ of a short step. Then $\sqrt{\bar\alpha_s / \bar\alpha_t} = 1 + \beta/2 + O(\beta^2)$ and
# $\sqrt{1 - \bar\alpha_s} = \sqrt{1 - \bar\alpha_t} - \beta \bar\alpha_t / (2 \sqrt{1 - \bar\alpha_t}) + O(\beta^2)$, so
#
# $$x_s = \sqrt{\bar\alpha_s}\, \hat x_0 + \sqrt{1 - \bar\alpha_s}\, \epsilon = x_t + \frac{\beta}{2} \left( x_t - \frac{\epsilon}{\sqrt{1 - \bar\alpha_t}} \right) + O(\beta^2) = x_t + \frac{\beta}{2} (x_t + \nabla \log q(x_t)) + O(\beta^2)$$
#
# The remainder should fall by four when the step is halved:
# <!-- ja -->
# ## 離散時間の微分方程式
#
# $\beta_t$ が小さければ $\sqrt{1 - \beta_t} = 1 - \beta_t / 2 + O(\beta_t^2)$ なので、式 (2) の 1 ステップは確率微分方程式 $dx = -\frac{1}{2} \beta\, x\, dt + \sqrt{\beta}\, dw$ に対するオイラー法の 1 ステップです。
# これはドリフトと、分散 $\beta\, dt$ のノイズからなります。密度 $q$ はどう変化するでしょうか。速度 $v$ の流れは密度を運び、$\partial q / \partial t = -\nabla \cdot (q v)$ です。ノイズは密度をぼかし、
# $\partial q / \partial t = \frac{\beta}{2} \Delta q$ です。ところが $\Delta q = \nabla \cdot \nabla q = \nabla \cdot (q \nabla \log q)$ ですから、このぼかしは速度 $-\frac{\beta}{2} \nabla \log q$ の流れと同じ働きをします。したがって、ノイズのまったくない
# **確率フロー** ODE $dx/dt = -\frac{1}{2} \beta (x + \nabla \log q(x))$ も、すべての時刻で同じ密度を持ちます。
#
# $\eta = 0$ の DDIM はこれを解いています。短いステップの $\beta_{t|s}$ を $\beta$ と書くと、$\sqrt{\bar\alpha_s / \bar\alpha_t} = 1 + \beta/2 + O(\beta^2)$、
# $\sqrt{1 - \bar\alpha_s} = \sqrt{1 - \bar\alpha_t} - \beta \bar\alpha_t / (2 \sqrt{1 - \bar\alpha_t}) + O(\beta^2)$ なので、
#
# $$x_s = \sqrt{\bar\alpha_s}\, \hat x_0 + \sqrt{1 - \bar\alpha_s}\, \epsilon = x_t + \frac{\beta}{2} \left( x_t - \frac{\epsilon}{\sqrt{1 - \bar\alpha_t}} \right) + O(\beta^2) = x_t + \frac{\beta}{2} (x_t + \nabla \log q(x_t)) + O(\beta^2)$$
#
# ステップを半分にすると、残りの項は 4 分の 1 になるはずです。


# %%
def ddim(x, t, s):
    c_0, c_t, _ = process.posterior_coefficients(t, s, eta=0.0)
    return c_0 * process.predict_x0(eps(x, t), x, t) + c_t * x


t, x, remainders = 500, torch.randn(200, 2), []
for length in (8, 4, 2, 1):
    beta = process.beta(t, t - length)
    euler = x + beta / 2 * (x + score(x, t))
    remainders.append(float((ddim(x, t, t - length) - euler).abs().max()))
ratios = [a / b for a, b in pairwise(remainders)]
print(
    "remainders", [f"{r:.1e}" for r in remainders], "ratios", [f"{r:.2f}" for r in ratios]
)
assert all(3.5 < ratio < 4.5 for ratio in ratios)  # arXiv 2011.13456, Eq. 13

beta = float(process.beta(500))
one_step = process.q_step_mean_variance(torch.ones(1, 1), 500)
assert abs(float(one_step.mean) - (1 - beta / 2)) < beta**2  # arXiv 2011.13456, Eq. 11

# %% [markdown]
# <!-- en -->
# ## Both lead to the data
#
# From the same noise, the deterministic chain and the ancestral one (with $\beta_t$) end in the same distribution: the shares of the three parts and their spread come out right.
# <!-- ja -->
# ## どちらもデータにたどり着く
#
# 同じノイズから出発すると、決定論的な連鎖も、$\beta_t$ を使う確率的な連鎖も、同じ分布に行き着きます。三つの成分の割合も広がりも正しく再現されます。

# %%
n = 2000
start = torch.randn(n, 2)
paths = {"ODE (DDIM)": [start], "SDE (DDPM)": [start]}
for name, path in paths.items():
    x = start
    for t in reversed(range(1000)):
        if name.startswith("ODE"):
            x = ddim(x, t, t - 1)
        else:
            step = process.p_mean_variance(eps(x, t), x, t, variance_type="fixed_large")
            x = step.mean + (step.variance.sqrt() * torch.randn_like(x) if t else 0)
        if t % 25 == 0:
            path.append(x)
    nearest = torch.cdist(x, centres).argmin(1)
    shares = torch.bincount(nearest, minlength=3) / n
    spread = torch.stack([x[nearest == i].std(0).mean() for i in range(3)])
    print(name)
    print("  shares", [f"{v:.3f}" for v in shares.tolist()], "of", weights.tolist())
    print("  spread", [f"{v:.3f}" for v in spread.tolist()], "of", stds.tolist())
    off = float((shares - weights).abs().max())
    assert off < 4 * (0.25 / n) ** 0.5  # arXiv 2011.13456, Eq. 13
    assert (spread - stds).abs().max() < 0.03

fig, axes = plt.subplots(1, 2, figsize=(9, 4), sharex=True, sharey=True)
for axis, (name, path) in zip(axes, paths.items(), strict=True):
    lines = torch.stack(path)[:, :12]
    axis.plot(path[-1][:800, 0], path[-1][:800, 1], ".", color="tab:red", markersize=2)
    axis.plot(lines[..., 0], lines[..., 1], color="tab:blue", linewidth=0.7, alpha=0.7)
    axis.set_title(f"{name}: 12 paths from noise, and where 800 end", fontsize=9)
    axis.set_aspect("equal")

# %% [markdown] tags=["exercise"]
# <!-- en -->
# Langevin dynamics $x \leftarrow x + \frac{h}{2} \nabla \log q(x) + \sqrt{h}\, z$ at the *smallest* noise alone, from random starts: why are the shares wrong, however long it runs?
# <!-- ja -->
# **最小の**ノイズのスコアだけを使い、ランダムな点からランジュバン動力学 $x \leftarrow x + \frac{h}{2} \nabla \log q(x) + \sqrt{h}\, z$ を実行します。いくら長く動かしても成分の割合が正しくならないのはなぜでしょうか。

# %% [markdown] tags=["solution"]
# <!-- en -->
# Between the parts the density is nearly 0, and a local step does not cross: each point stays with the part that it starts near to. Noise at all scales is what lets points change sides early on.
# <!-- ja -->
# 成分の間では密度がほぼ 0 で、局所的な移動では越えられません。各点は、出発点に近い成分に留まり続けます。さまざまな大きさのノイズを使うことで、早い段階で点が行き先を変えられるのです。

# %% tags=["solution"]
x, h = 2 * torch.rand(2000, 2) - 1, 0.002
for _ in range(500):
    x = (
        x
        - h / 2 * eps(x, 0) / process.one_minus_alpha_bar(0).sqrt()
        + h**0.5 * torch.randn_like(x)
    )
shares = torch.bincount(torch.cdist(x, centres).argmin(1), minlength=3) / 2000
print([f"{v:.3f}" for v in shares.tolist()], "instead of", weights.tolist())
assert (shares - weights).abs().max() > 0.05
