// Which of the two pages is shown.

import { JobPage } from './job.js'
import { JobsPage } from './jobs.js'
import { tell } from './api.js'

const main = document.getElementById('main')
let page = null

function show () {
  page?.close()
  tell('trainer', null)
  const found = location.hash.match(/^#\/jobs\/(.+)$/)
  const id = found ? decodeURIComponent(found[1]) : null
  document.title = id ? `${id} – Tandem` : 'Tandem'
  main.replaceChildren()
  page = id ? new JobPage(main, id) : new JobsPage(main)
}

// The cookie has the token by now: it need not stay where people see it and copy it.
if (location.search) history.replaceState(null, '', location.pathname + location.hash)
window.addEventListener('hashchange', () => {
  if (location.hash === '#main') return main.focus()
  show()
  main.focus()
})
show()
