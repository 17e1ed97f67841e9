# %% [markdown]
# <!-- en -->
# # 3. The posterior
#
# Going back one step, from $x_t$ to $x_{t-1}$, is hard if all we know is $x_t$. If we also know the image $x_0$, it is a
# Gaussian with a formula. That formula is what the network will imitate, so we derive it in full.
# <!-- ja -->
# # 3. 事後分布
#
# $x_t$ しか分からないとき、1 ステップ戻って $x_{t-1}$ を求めるのは困難です。ところが元の画像 $x_0$ も分かっていれば、答えは式で書ける
# ガウス分布になります。ネットワークが真似るのはこの式ですから、省略せずに導出します。

# %% [markdown]
# <!-- en -->
# ## The statement
#
# $$q(x_{t-1} \mid x_t, x_0) = \mathcal{N}(\tilde\mu_t(x_t, x_0), \tilde\beta_t I) \qquad (6)$$
#
# $$\tilde\mu_t(x_t, x_0) = \frac{\sqrt{\bar\alpha_{t-1}}\, \beta_t}{1 - \bar\alpha_t} x_0 + \frac{\sqrt{\alpha_t}\, (1 - \bar\alpha_{t-1})}{1 - \bar\alpha_t} x_t, \qquad \tilde\beta_t = \frac{1 - \bar\alpha_{t-1}}{1 - \bar\alpha_t} \beta_t \qquad (7)$$
#
# ## The proof, by completing the square
#
# Bayes' rule, for a fixed $x_0$, and the Markov property $q(x_t \mid x_{t-1}, x_0) = q(x_t \mid x_{t-1})$ give
#
# $$q(x_{t-1} \mid x_t, x_0) = \frac{q(x_t \mid x_{t-1})\, q(x_{t-1} \mid x_0)}{q(x_t \mid x_0)}$$
#
# All components are independent, so one is enough. As a function of $x = x_{t-1}$ the denominator is a constant, and (2) and
# (4) say what the factors are:
#
# $$-2 \log q(x \mid x_t, x_0) = \frac{(x_t - \sqrt{\alpha_t}\, x)^2}{\beta_t} + \frac{(x - \sqrt{\bar\alpha_{t-1}}\, x_0)^2}{1 - \bar\alpha_{t-1}} + \mathrm{const}$$
#
# This is a quadratic function of $x$, so $q$ is Gaussian. With variance $\tilde\beta$ and mean $\tilde\mu$ it has to be
# $x^2 / \tilde\beta - 2 x \tilde\mu / \tilde\beta + \mathrm{const}$. *The factor of $x^2$:*
#
# $$\frac{1}{\tilde\beta_t} = \frac{\alpha_t}{\beta_t} + \frac{1}{1 - \bar\alpha_{t-1}} = \frac{\alpha_t - \alpha_t \bar\alpha_{t-1} + \beta_t}{\beta_t (1 - \bar\alpha_{t-1})} = \frac{1 - \bar\alpha_t}{\beta_t (1 - \bar\alpha_{t-1})}$$
#
# since $\alpha_t + \beta_t = 1$ and $\alpha_t \bar\alpha_{t-1} = \bar\alpha_t$. *The factor of $-2x$:*
#
# $$\frac{\tilde\mu_t}{\tilde\beta_t} = \frac{\sqrt{\alpha_t}}{\beta_t} x_t + \frac{\sqrt{\bar\alpha_{t-1}}}{1 - \bar\alpha_{t-1}} x_0$$
#
# Multiplied by $\tilde\beta_t$, that is (7). ∎
# <!-- ja -->
# ## 主張
#
# $$q(x_{t-1} \mid x_t, x_0) = \mathcal{N}(\tilde\mu_t(x_t, x_0), \tilde\beta_t I) \qquad (6)$$
#
# $$\tilde\mu_t(x_t, x_0) = \frac{\sqrt{\bar\alpha_{t-1}}\, \beta_t}{1 - \bar\alpha_t} x_0 + \frac{\sqrt{\alpha_t}\, (1 - \bar\alpha_{t-1})}{1 - \bar\alpha_t} x_t, \qquad \tilde\beta_t = \frac{1 - \bar\alpha_{t-1}}{1 - \bar\alpha_t} \beta_t \qquad (7)$$
#
# ## 平方完成による証明
#
# $x_0$ を固定してベイズの定理を使います。マルコフ性 $q(x_t \mid x_{t-1}, x_0) = q(x_t \mid x_{t-1})$ より、
#
# $$q(x_{t-1} \mid x_t, x_0) = \frac{q(x_t \mid x_{t-1})\, q(x_{t-1} \mid x_0)}{q(x_t \mid x_0)}$$
#
# 各成分は独立なので、1 成分だけ考えれば十分です。$x = x_{t-1}$ の関数として見ると分母は定数で、分子の二つの因子は式 (2) と式 (4) から
# 分かっています。
#
# $$-2 \log q(x \mid x_t, x_0) = \frac{(x_t - \sqrt{\alpha_t}\, x)^2}{\beta_t} + \frac{(x - \sqrt{\bar\alpha_{t-1}}\, x_0)^2}{1 - \bar\alpha_{t-1}} + \mathrm{const}$$
#
# 右辺は $x$ の 2 次関数ですから、$q$ はガウス分布です。分散を $\tilde\beta$、平均を $\tilde\mu$ とすれば、
# $x^2 / \tilde\beta - 2 x \tilde\mu / \tilde\beta + \mathrm{const}$ の形になるはずです。まず **$x^2$ の係数**を比べると、
#
# $$\frac{1}{\tilde\beta_t} = \frac{\alpha_t}{\beta_t} + \frac{1}{1 - \bar\alpha_{t-1}} = \frac{\alpha_t - \alpha_t \bar\alpha_{t-1} + \beta_t}{\beta_t (1 - \bar\alpha_{t-1})} = \frac{1 - \bar\alpha_t}{\beta_t (1 - \bar\alpha_{t-1})}$$
#
# ここで $\alpha_t + \beta_t = 1$ と $\alpha_t \bar\alpha_{t-1} = \bar\alpha_t$ を使いました。次に **$-2x$ の係数**を比べると、
#
# $$\frac{\tilde\mu_t}{\tilde\beta_t} = \frac{\sqrt{\alpha_t}}{\beta_t} x_t + \frac{\sqrt{\bar\alpha_{t-1}}}{1 - \bar\alpha_{t-1}} x_0$$
#
# 両辺に $\tilde\beta_t$ を掛ければ式 (7) が得られます。∎

# %% [markdown]
# <!-- en -->
# ## The number
#
# [`q_posterior`][P.q_posterior] is (6) and (7). We multiply the two densities of Bayes' rule on a fine grid, normalise, and compare:
# <!-- ja -->
# ## 数値で確かめる
#
# 式 (6)、(7) を実装しているのが [`q_posterior`][P.q_posterior] です。ベイズの定理に現れる二つの密度を細かい格子の上で掛け合わせ、正規化して
# 比べます。

# %%
import matplotlib.pyplot as plt
import torch
from torch.distributions import Normal

from ddpm_hf import DDPMProcess
from ddpm_hf.diffusion.ddpm_process import make_betas

process = DDPMProcess(make_betas("linear", 1000))
x_0 = torch.tensor([[0.5]], dtype=torch.float64)
fig, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
for axis, t in zip(axes, (3, 50, 900), strict=True):  # the paper's t is one more
    x_t = process.q_sample(x_0, t, torch.tensor([[1.3]], dtype=torch.float64))
    prior = process.q_mean_variance(x_0, t - 1)
    width = 8 * process.q_posterior(x_0, x_t, t).variance.sqrt()
    x = (
        torch.linspace(-1, 1, 20_001, dtype=torch.float64) * width.item()
        + process.q_posterior(x_0, x_t, t).mean.item()
    )
    step = process.q_step_mean_variance(x[:, None], t)
    likelihood = Normal(step.mean, step.variance.sqrt()).log_prob(x_t).flatten()
    density = (
        likelihood + Normal(prior.mean, prior.variance.sqrt()).log_prob(x).flatten()
    ).exp()
    density = density / torch.trapezoid(density, x)

    posterior = process.q_posterior(x_0, x_t, t)
    mean = torch.trapezoid(x * density, x)
    variance = torch.trapezoid((x - mean) ** 2 * density, x)
    print(
        f"t = {t:3}: mean {mean:.6f} and {posterior.mean.item():.6f}, "
        f"std {variance.sqrt():.6f} and {posterior.variance.sqrt().item():.6f}"
    )
    assert abs(mean.item() / posterior.mean.item() - 1) < 1e-9  # Eq. 7
    assert abs(variance.item() / posterior.variance.item() - 1) < 1e-6  # Eq. 7
    exact = Normal(posterior.mean, posterior.variance.sqrt()).log_prob(x).exp().flatten()
    assert (density / exact.max() - exact / exact.max()).abs().max() < 1e-6  # Eq. 6
    axis.plot(x, density)
    axis.plot(x, exact, "--")
    axis.set_title(f"t = {t}")
    axis.set_xlabel("x_(t-1)")
axes[0].set_ylabel("density")
fig.legend(["Bayes' rule on a grid", "Eq. 6-7"], ncols=2, loc="outside upper center")

# %% [markdown] tags=["exercise"]
# <!-- en -->
# Show that $\tilde\beta_t < \beta_t$ for every $t$, that $\tilde\beta_1 = 0$, and say what both mean.
# <!-- ja -->
# すべての $t$ で $\tilde\beta_t < \beta_t$ であること、また $\tilde\beta_1 = 0$ であることを示し、それぞれの意味を説明してください。

# %% [markdown] tags=["solution"]
# <!-- en -->
# $\bar\alpha_t < \bar\alpha_{t-1}$, so the factor $(1 - \bar\alpha_{t-1})/(1 - \bar\alpha_t)$ is less than 1: knowing $x_0$ leaves less
# to guess than one step of noise has added. And $\bar\alpha_0 = 1$, so $\tilde\beta_1 = 0$: who knows $x_0$ has nothing to guess
# about it.
# <!-- ja -->
# $\bar\alpha_t < \bar\alpha_{t-1}$ なので係数 $(1 - \bar\alpha_{t-1})/(1 - \bar\alpha_t)$ は 1 未満です。$x_0$ を知っていれば、残る不確かさは
# 1 ステップで加えたノイズより小さい、ということです。また $\bar\alpha_0 = 1$ より $\tilde\beta_1 = 0$ です。$x_0$ を知っている人にとって、
# $x_0$ に不確かさはありません。

# %% tags=["solution"]
t = torch.arange(1, 1000)
_, _, beta_tilde = process.posterior_coefficients(t)
assert (beta_tilde < process.beta(t)).all()
assert float(process.posterior_coefficients(0)[2]) == 0
ratio = beta_tilde / process.beta(t)
print(f"β̃/β: {float(ratio[0]):.3f} at the second step, {float(ratio[-1]):.5f} at the last")
