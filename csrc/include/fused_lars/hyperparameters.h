#pragma once

// CUDA kernels receive this struct as it is, so it is plain data and includes nothing of torch.

#include "fused_lars/export.h"

namespace fused_lars {

// What the parameters of one group share. rule.h gives each field its meaning.
struct Hyperparameters {
  double lr = 1.0;                   // finite, >= 0
  double momentum = 0.0;             // in [0, 1); 0 keeps no momentum buffer
  double weight_decay = 0.0;         // finite, >= 0
  double trust_coefficient = 0.001;  // finite, > 0
  double eps = 0.0;                  // finite, >= 0
  double dampening = 0.0;            // in [0, 1]; needs classic_momentum == false
  bool nesterov = false;             // needs momentum > 0 and dampening == 0
  bool maximize = false;
  bool trust_clip = false;
  bool layer_adaptation = true;
  bool decayed_norm = false;  // the ratio divides by |g' + weight_decay * w|
  bool classic_momentum = true;
  bool master_weights = false;       // an fp32 master for each fp16 or bf16 parameter; others have none
  bool stochastic_rounding = false;  // of fp16 and bf16 parameters; needs master_weights == false

  bool operator==(const Hyperparameters&) const = default;
};

// Calls visit(name, member) for every field, in the order of the ops' arguments. This one list makes the ops'
// schemas, the reading of their arguments, and what optimizers pass on and store.
template <typename Visit>
void for_each_hyperparameter(const Visit& visit) {
  visit("lr", &Hyperparameters::lr);
  visit("momentum", &Hyperparameters::momentum);
  visit("weight_decay", &Hyperparameters::weight_decay);
  visit("trust_coefficient", &Hyperparameters::trust_coefficient);
  visit("eps", &Hyperparameters::eps);
  visit("dampening", &Hyperparameters::dampening);
  visit("nesterov", &Hyperparameters::nesterov);
  visit("maximize", &Hyperparameters::maximize);
  visit("trust_clip", &Hyperparameters::trust_clip);
  visit("layer_adaptation", &Hyperparameters::layer_adaptation);
  visit("decayed_norm", &Hyperparameters::decayed_norm);
  visit("classic_momentum", &Hyperparameters::classic_momentum);
  visit("master_weights", &Hyperparameters::master_weights);
  visit("stochastic_rounding", &Hyperparameters::stochastic_rounding);
}

// Throws the error type that belongs to the first value out of range. The message names `group`, unless that
// is negative.
FUSED_LARS_API void validate(const Hyperparameters& hyperparameters, long group = -1);

}  // namespace fused_lars
