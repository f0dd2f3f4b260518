// What is kept of a job's events, in bounded memory: as much as the server's picture of it, and as much again.

const POINTS = 4000
const ROLLOUTS = 12 // events with some each
const LINES = 500
const CHANGES = 50

export class History {
  constructor () {
    this.rows = [] // of figures: step and values
    this.samples = []
    this.lines = []
    this.changes = [] // states and checkpoints, with their kind
    this.progress = null
    this.last = 0
    this.version = 0 // the last figures' sequence number
  }

  add (kind, event) {
    if (event.sequence <= this.last) return
    this.last = event.sequence
    if (kind === 'metrics') this.metrics(event)
    else if (kind === 'samples') keep(this.samples, event, ROLLOUTS)
    else if (kind === 'log') keep(this.lines, event, LINES)
    else keep(this.changes, [kind, event], CHANGES)
  }

  metrics ({ sequence, step, max_steps: most, values }) {
    this.version = sequence
    this.progress = { step, max_steps: most }
    // Steps that are done again, after a checkpoint, replace what they were before.
    while (this.rows.length && this.rows.at(-1).step > step) this.rows.pop()
    if (this.rows.at(-1)?.step === step) Object.assign(this.rows.at(-1).values, values)
    else this.rows.push({ step, values: { ...values } })
    if (this.rows.length > POINTS) this.rows = this.rows.filter((_, index) => index % 2 === 0 || index === this.rows.length - 1)
  }

  names () {
    if (this.named !== this.version) {
      this.named = this.version
      this.all = [...new Set(this.rows.flatMap(row => Object.keys(row.values)))].sort()
    }
    return this.all ?? []
  }

  // Pairs of step and value. A figure that is no number came as text that says which.
  curve (name) {
    return this.rows.filter(row => name in row.values).map(row => [row.step, Number(row.values[name])])
  }
}

function keep (list, item, most) {
  list.push(item)
  if (list.length > most) list.shift()
}
