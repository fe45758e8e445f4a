#include "fused_lars/hyperparameters.h"

#include <cmath>
#include <string>

#include "fused_lars/errors.h"

namespace fused_lars {

void validate(const Hyperparameters& h, long group) {
  const auto where = [group] { return group < 0 ? std::string() : c10::str(" in group ", group); };
  const auto not_negative = [](double x) { return std::isfinite(x) && x >= 0.0; };

  FUSED_LARS_CHECK(not_negative(h.lr), InvalidLearningRate, "Invalid learning rate", where(), ": ", h.lr,
                   "; allowed: finite and >= 0");
  FUSED_LARS_CHECK(h.momentum >= 0.0 && h.momentum < 1.0, InvalidMomentum, "Invalid momentum value", where(),
                   ": ", h.momentum, "; allowed: >= 0 and < 1");
  FUSED_LARS_CHECK(not_negative(h.weight_decay), InvalidWeightDecay, "Invalid weight_decay value", where(),
                   ": ", h.weight_decay, "; allowed: finite and >= 0");
  FUSED_LARS_CHECK(std::isfinite(h.trust_coefficient) && h.trust_coefficient > 0.0, InvalidTrustCoefficient,
                   "Invalid trust_coefficient value", where(), ": ", h.trust_coefficient,
                   "; allowed: finite and > 0");
  FUSED_LARS_CHECK(not_negative(h.eps), InvalidOption, "Invalid eps value", where(), ": ", h.eps,
                   "; allowed: finite and >= 0");
  FUSED_LARS_CHECK(h.dampening >= 0.0 && h.dampening <= 1.0, InvalidOption, "Invalid dampening value",
                   where(), ": ", h.dampening, "; allowed: >= 0 and <= 1");
  FUSED_LARS_CHECK(!h.nesterov || (h.momentum > 0.0 && h.dampening == 0.0), InvalidOption,
                   "Nesterov momentum requires a momentum and zero dampening", where(), ": momentum ",
                   h.momentum, ", dampening ", h.dampening);
  FUSED_LARS_CHECK(h.dampening == 0.0 || !h.classic_momentum, InvalidOption, "Invalid dampening value",
                   where(), ": ", h.dampening,
                   "; dampening belongs to torch's momentum, allowed with classic_momentum=False");
  FUSED_LARS_CHECK(!h.stochastic_rounding || !h.master_weights, InvalidOption,
                   "Invalid stochastic_rounding value", where(),
                   ": true; allowed without master_weights only, since a master loses nothing to rounding");
}

}  // namespace fused_lars
