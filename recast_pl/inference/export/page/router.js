"use strict";
// Finds the task of an image by features of the network that all tasks start from, as recast_pl.learning.router does.

function softmax(scores) {
  const largest = scores.reduce((a, b) => Math.max(a, b)), powers = Array.from(scores, score => Math.exp(score - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map(power => power / sum);
}

class Router {
  // The tensors {data, shape} of the router's file, and what it says of them.
  constructor(tensors, told) {
    Object.assign(this, told);
    for (const [name, {data}] of Object.entries(tensors)) this[name] = data;
  }

  // Names and probabilities of the likeliest two tasks, and the share of known images that are at least as strange.
  route(features) {
    const x = Float64Array.from(features, (feature, i) => feature - this.centre[i]), width = x.length;
    const scores = Array.from(this.bias, (bias, k) => {
      let sum = bias;
      for (let i = 0; i < width; i++) sum += this.weight[k * width + i] * x[i];
      return sum;
    });
    const probabilities = new Array(this.tasks.length).fill(0);
    softmax(scores.map(score => score / this.temperature)).forEach((p, k) => { probabilities[this.task_of[k]] += p; });
    const tasks = this.tasks.map((name, k) => [name, probabilities[k]]).sort((a, b) => b[1] - a[1]).slice(0, 2);
    return {tasks, familiar: this.familiar(x, scores, tasks[0][1])};
  }

  familiar(x, scores, likeliest) {
    if (!this.strange) return 1;
    const distance = this.length(x) - 2 * scores.reduce((a, b) => Math.max(a, b));
    const strange = [distance, 1 - likeliest].reduce((sum, value, k) => sum + (value - this.usual[k]) / this.spread[k], 0);
    const count = this.strange.length, below = this.strange.filter(value => value < strange).length;
    return (count - below + 1) / (count + 1);
  }

  length(x) {  // |Lᵀ·S·x|², with the lower triangle L row by row
    const sums = new Float64Array(x.length);
    let place = 0;
    x.forEach((value, row) => {
      const scaled = value * this.scale[row];
      for (let column = 0; column <= row; column++) sums[column] += this.factor[place++] * scaled;
    });
    return sums.reduce((sum, value) => sum + value * value, 0);
  }
}
