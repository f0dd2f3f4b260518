// One job's page: how far it is, its curves, its newest rollouts and log lines, its engine.

import { Failed, act, away, get, tell } from './api.js'
import { Chart } from './chart.js'
import { age, badge, bytes, clock, figure, h, progress } from './dom.js'
import { EnginePanel } from './engine.js'
import { History } from './history.js'

// The figure that rises as the policy learns, by the names of the algorithms.
const REWARDS = ['reward', 'objective/scores', 'objective/model_scores', 'rewards/chosen']
const CURVES = ['reward', 'loss', 'tandem/tokens_per_second', 'tandem/sync_ms']
const ACTIONS = [
  ['cancel', 'Cancel', ['QUEUED', 'STARTING', 'RUNNING', 'RETRYING'], 'Cancel this job? It saves a checkpoint if it can.'],
  ['resume', 'Resume', ['CANCELLED', 'FAILED'], null],
  ['delete', 'Delete', null, 'Delete this job, with its checkpoints and all else that it has? This cannot be undone.']
]
const AGAIN_MS = 2000

export class JobPage {
  constructor (root, id) {
    this.path = `/api/jobs/${encodeURIComponent(id)}`
    this.id = id
    this.job = null
    this.history = new History()
    this.charts = []
    this.drawn = new Map()
    this.build(root)
    this.engine = new EnginePanel(this.engines, `${this.path}/engines`)
    this.read()
    this.follow()
  }

  close () {
    this.over = true
    clearTimeout(this.timer)
    this.source?.close()
    this.engine.close()
    this.charts.forEach(chart => chart.close())
  }

  build (root) {
    this.state = h('span', { id: 'job-state' })
    this.progress = h('div', { class: 'wide' })
    this.reason = h('p', { class: 'reason', id: 'job-reason' })
    this.said = h('p', { class: 'said', role: 'alert' })
    this.buttons = Object.fromEntries(ACTIONS.map(([action, label, , question]) => [action,
      h('button', { id: action, class: action === 'delete' ? 'danger' : '', disabled: true, onclick: () => this.act(action, question) }, label)]))
    this.facts = h('dl', { class: 'facts' })
    this.curves = h('div', { class: 'curves' })
    this.samples = h('div', { id: 'samples', role: 'region', 'aria-label': 'latest rollouts', tabindex: 0 })
    this.lines = h('pre', { id: 'log', role: 'log', 'aria-live': 'off', 'aria-label': 'log lines', tabindex: 0 })
    this.changes = h('ol', { class: 'changes', 'aria-label': 'states and checkpoints', tabindex: 0 })
    this.engines = h('section', { class: 'card', 'aria-label': 'Engine' }, h('h2', {}, 'Engine'))
    root.append(
      h('p', { class: 'back' }, h('a', { href: '#/' }, '← All jobs')),
      h('div', { class: 'bar' }, h('h1', {}, this.id), this.state, h('span', { class: 'space' }),
        h('div', { class: 'actions' }, Object.values(this.buttons))),
      this.said, this.reason, this.progress, this.facts, this.curves,
      h('div', { class: 'columns' },
        h('section', { class: 'card', 'aria-label': 'Rollouts' }, h('h2', {}, 'Latest rollouts'), this.samples),
        h('div', {}, this.engines,
          h('section', { class: 'card', 'aria-label': 'States and checkpoints' }, h('h2', {}, 'States and checkpoints'), this.changes))),
      h('section', { class: 'card', 'aria-label': 'Log' }, h('h2', {}, 'Log'), this.lines))
  }

  // What the service tells of the job, asked for where events do not say it all.
  async read () {
    try {
      this.job = await get(this.path)
      if (!this.over) this.draw()
    } catch (error) {
      if (!this.over && !away(error)) this.said.textContent = error.message
    }
  }

  // The server's events. A stream that broke goes on by itself, after the last event that came.
  follow () {
    this.source = new EventSource(`${this.path}/events`)
    const on = (kind, work) => this.source.addEventListener(kind, event => work(JSON.parse(event.data)))
    on('service', told => this.told(told))
    on('picture', events => {
      this.history = new History()
      for (const [kind, event] of events) this.history.add(kind, event)
      this.soon()
    })
    for (const kind of ['state', 'metrics', 'samples', 'log', 'checkpoint']) {
      on(kind, event => {
        this.history.add(kind, event)
        this.soon()
        if (kind === 'state') this.read()
      })
    }
    this.source.onerror = () => {
      if (this.source.readyState !== EventSource.CLOSED || this.over || this.gone) return
      this.timer = setTimeout(async () => {
        await this.read() // says who does not answer
        if (!this.over) this.follow()
      }, AGAIN_MS)
    }
  }

  told ({ up, gone, error }) {
    tell('trainer', up ? null : `The trainer service does not answer: ${error.message}. Trying again.`)
    if (gone) {
      this.gone = true
      this.source.close()
      this.state.replaceChildren(badge('GONE'))
      Object.values(this.buttons).forEach(button => { button.disabled = true })
      this.said.textContent = `${error.message}.`
    } else if (up) this.read()
  }

  async act (action, question) {
    if (question && !(await agreed(question))) return
    this.said.textContent = ''
    this.buttons[action].disabled = true
    try {
      const job = await act(this.id, action)
      if (action === 'delete') {
        location.hash = '#/'
        return
      }
      this.job = job
    } catch (error) {
      if (!(error instanceof Failed)) throw error
      this.said.textContent = `${error.message}.`
    }
    this.draw()
  }

  // Many events come at once: they are drawn together.
  soon () {
    if (this.waiting || this.over) return
    this.waiting = true
    requestAnimationFrame(() => {
      this.waiting = false
      if (!this.over) this.draw()
    })
  }

  draw () {
    this.drawHead()
    this.drawCurves()
    const { samples, lines, changes } = this.history
    this.once('samples', samples.at(-1)?.sequence, () => this.samples.replaceChildren(...sampleList(samples)))
    this.once('log', lines.at(-1)?.sequence, () => this.drawLines(lines))
    this.once('changes', changes.at(-1)?.[1].sequence, () => this.changes.replaceChildren(...changes.toReversed().map(change)))
  }

  // Draw a part only if it changed: what somebody reads or has marked stays.
  once (part, version, work) {
    if (this.drawn.has(part) && this.drawn.get(part) === version) return
    this.drawn.set(part, version)
    work()
  }

  drawHead () {
    const job = this.job
    if (!job || this.gone) return
    document.title = `${job.state} ${job.id} – Tandem`
    const now = this.history.progress
    const [step, most] = now && now.step >= job.step ? [now.step, now.max_steps] : [job.step, job.max_steps]
    this.once('head', JSON.stringify([job.state, job.reason, step, most]), () => {
      this.state.replaceChildren(badge(job.state))
      this.reason.textContent = job.reason
      this.progress.replaceChildren(progress(step, most))
      for (const [action, , states] of ACTIONS) {
        this.buttons[action].disabled = states ? !states.includes(job.state) : job.state === 'DELETING'
      }
    })
    const facts = [
      ['Algorithm', job.algorithm], ['Model', job.model], ['Submitted', age(job.create_time)],
      ...(job.attempt > 1 ? [['Attempt', job.attempt]] : []),
      ...(job.gpus.length ? [['GPUs', job.gpus.join(', ')]] : []),
      ...Object.entries(job.labels),
      ['Folder', job.folder]
    ]
    this.once('facts', JSON.stringify(facts), () => this.facts.replaceChildren(
      ...facts.map(([name, value]) => h('div', {}, h('dt', {}, name), h('dd', {}, String(value))))))
  }

  drawCurves () {
    const names = this.history.names()
    if (!this.charts.length) {
      if (!names.length) return
      const reward = REWARDS.find(name => names.includes(name)) ?? 'reward'
      this.charts = CURVES.map(name => new Chart(name === 'reward' ? reward : name, names, picked => this.redraw(picked)))
      this.curves.append(...this.charts.map(chart => chart.element))
    }
    this.once('curves', this.history.version, () => this.redraw())
  }

  redraw () {
    queueMicrotask(() => {
      for (const chart of this.charts) {
        chart.offer(this.history.names())
        chart.show(this.history.curve(chart.name))
      }
    })
  }

  drawLines (lines) {
    const log = this.lines
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40
    log.replaceChildren(lines.map(line => `${line.text}\n`).join(''))
    if (atEnd) log.scrollTop = log.scrollHeight
  }
}

function sampleList (samples) {
  if (!samples.length) return [h('p', { class: 'empty' }, 'None yet..')]
  return samples.toReversed().flatMap(({ step, samples: rollouts }) => rollouts.map(rollout =>
    h('article', { class: 'sample' },
      h('p', { class: 'chips' },
        h('span', {}, `step ${step}`),
        Object.entries(rollout.rewards).map(([name, value]) => h('span', { class: 'reward-chip' }, `${name} ${figure(Number(value))}`)),
        rollout.advantage === null ? null : h('span', {}, `advantage ${figure(Number(rollout.advantage))}`),
        h('span', {}, `weight version ${rollout.weight_version}`)),
      h('pre', { class: 'prompt' }, rollout.prompt),
      h('pre', { class: 'completion' }, rollout.completion))))
}

function change ([kind, event]) {
  if (kind === 'state') {
    return h('li', {}, clock(event.time), badge(event.state), event.reason ? h('span', { class: 'reason' }, event.reason) : null)
  }
  return h('li', {}, clock(event.time), h('span', { class: 'badge' }, 'checkpoint'),
    h('span', { class: 'reason' }, `${event.path} (${bytes(event.bytes)})`))
}

function agreed (question) {
  const dialog = document.getElementById('ask')
  document.getElementById('ask-text').textContent = question
  dialog.returnValue = 'no'
  dialog.showModal()
  return new Promise(resolve => dialog.addEventListener('close', () => resolve(dialog.returnValue === 'yes'), { once: true }))
}
